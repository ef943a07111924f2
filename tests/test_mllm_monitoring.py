"""The share of images of each expert, counted in inference and logged by transformers' Trainer."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from _mllms import EXPERTS, IMAGE, KINDS, VIDEO, Kind
from peft import get_peft_model
from test_mllm_parity import mixed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from mixpert_kernels.hf.mllm import (
    ExpertSharesCallback,
    expert_shares,
    forced_routing,
    lora_config,
    record_routing,
)
from mixpert_kernels.hf.mllm.monitoring import ExpertShares

NAMES = ["versatile", "chart", "document"]
PROCESSES = 2


def joined(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def shares_of(experts: Sequence[int], where: str = "") -> dict[str, float]:
    return {
        f"router/share/{where}{name}": experts.count(i) / len(experts)
        for i, name in enumerate(NAMES)
    }


def named(kind: Kind) -> nn.Module:
    return mixed(kind, expert_names=NAMES)


def video_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[1, 3, *[VIDEO] * (3 * 4 + 1), 7]])
    return {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(1, 3, 3, 16, 16, generator=generator),
    }


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_each_image_counts_once(family):
    """However many tiles it has, and although some families don't tell the host how many images there are."""
    kind = KINDS[family]
    model, seen = named(kind), []
    with expert_shares(model) as shares:
        for prompts in kind.prompts.values():
            images = sum(map(len, prompts))
            routes = [(images + i * i) % EXPERTS for i in range(images)]
            with forced_routing(model, routes):
                model(**kind.call(prompts))
            seen += routes
        model.generate(**kind.call(kind.prompts["one image"]), max_new_tokens=2)
        counts = shares.counts()
    assert counts[0].sum() == len(seen) + 1 and not counts[1].any()
    with forced_routing(model, 1):
        model(**kind.call(kind.prompts["one image"]))
    assert torch.equal(shares.counts(), counts)  # no longer counted
    with expert_shares(model) as again, forced_routing(model, routes):
        model(**kind.call(prompts))
    assert again.read() == shares_of(routes)
    again.reset()
    assert again.read() == {}


@torch.no_grad()
def test_videos_have_shares_of_their_own():
    model = named(KINDS["llava_onevision"])
    with expert_shares(model) as shares, forced_routing(model, 2, video_expert=1):
        model(**video_inputs())
        assert shares.read() == shares_of([1], "video/")
        model(**KINDS["llava_onevision"].call([[3]]))
    assert shares.read() == {**shares_of([2]), **shares_of([1], "video/")}


@torch.no_grad()
def test_experts_without_names_are_numbered():
    kind = KINDS["llava"]
    with expert_shares(model := mixed(kind)) as shares, forced_routing(model, 2):
        model(**kind.call([[1]]))
    assert shares.read() == {f"router/share/expert {i}": float(i == 2) for i in range(EXPERTS)}


@torch.no_grad()
def test_counting_ends_whatever_else_does():
    """Other threads don't count, and what is recorded meanwhile goes on."""
    kind = KINDS["llava"]
    model, inputs = named(kind), kind.call([[1]])
    with record_routing(model) as records:
        context = expert_shares(model)
        shares = context.__enter__()
        with record_routing(model) as inner:
            context.__exit__(None, None, None)
            model(**inputs)
        model(**inputs)
    assert (len(records), len(inner), shares.read()) == (2, 1, {})
    with record_routing(model):
        context = expert_shares(model)
        shares = context.__enter__()
    model(**inputs)
    context.__exit__(None, None, None)
    assert int(shares.counts().sum()) == 1
    with expert_shares(model) as shares:
        thread = threading.Thread(target=lambda: model(**inputs))
        thread.start()
        thread.join()
        assert shares.read() == {}
        with torch.inference_mode():
            model(**inputs)
        model(**inputs)
        assert int(shares.counts().sum()) == 2


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_only_reading_waits_for_the_device():
    kind = KINDS["idefics3"]
    with record_routing(model := named(kind)) as records:
        model(**kind.call(kind.prompts["batch"]))
    shares = ExpertShares(model)
    with Calls() as calls:
        shares.append(records[0])
        shares.append(records[0])
    waits = {"_local_scalar_dense", "nonzero", "_to_copy", "copy_", "masked_select"}
    assert records[0].images.padded and calls.names and not calls.names & waits
    assert int(shares.counts().sum()) == 2 * 4


class Rows(torch.utils.data.Dataset):
    """Prompts of 0 to 2 images."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> int:
        return i


def collate(rows: list[int]) -> dict[str, Tensor]:
    inputs = KINDS["internvl"].call([[3, 1][: row % 3] for row in rows], seed=rows[0])
    ids = inputs["input_ids"]
    return {**inputs, "labels": ids.masked_fill((ids == IMAGE) | (ids == 0), -100)}


class Watched(Trainer):
    """Trains expert after expert, and keeps each step's expert of each image, by what record_routing says."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[list[int]] = []

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        routes = forced_routing(self.model, len(self.seen) % EXPERTS)
        with routes, record_routing(self.model) as records:
            loss = super().training_step(*args, **options)
        self.seen.append([e for record in records for e in record.expert.tolist()])
        return loss


def trainer_of(folder: Path, model: nn.Module | None = None, **options: Any) -> Watched:
    fields = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    model = named(KINDS["internvl"]) if model is None else model
    arguments = TrainingArguments(str(folder), **{**fields, **options})
    data = {"train_dataset": Rows(), "eval_dataset": Rows()}
    trainer = Watched(model, arguments, data_collator=collate, **data)
    trainer.add_callback(ExpertSharesCallback(trainer))
    return trainer


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    """By step, the rows of shares."""
    rows = [row for row in trainer.state.log_history if any("share" in key for key in row)]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: {k: v for k, v in row.items() if "share" in k} for row in rows}


def wanted(seen: list[list[int]], every: int) -> dict[int, dict[str, float]]:
    ends = range(every, len(seen) + 1, every)
    return {end: shares_of(joined(seen[end - every : end])) for end in ends}


def by_step(trainer: Watched) -> list[list[int]]:
    """The experts of each step's images, the accumulated batches of a step together."""
    n = trainer.args.gradient_accumulation_steps
    return [joined(trainer.seen[i : i + n]) for i in range(0, len(trainer.seen), n)]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_trainer_logs_the_shares_since_the_last_log(adapter, tmp_path):
    model = named(KINDS["internvl"])
    if adapter:
        model = get_peft_model(model, lora_config(model, r=2))
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert logged(trainer) == wanted(trainer.seen, 2)
    assert len({tuple(row.values()) for row in logged(trainer).values()}) > 1
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [2, 4, 6]
    trainer.train()  # from the start again
    assert logged(trainer) == wanted(trainer.seen[6:], 2)


@pytest.mark.parametrize(
    "every, options",
    [
        (3, {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 3}),
        (8, {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
        (2, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 4}),
    ],
    ids=["evaluation", "epochs", "accumulation"],
)
def test_only_training_counts_and_all_of_it(every, options, tmp_path):
    trainer = trainer_of(tmp_path, **options)
    trainer.train()
    assert logged(trainer) == wanted(by_step(trainer), every)


def test_tensorboard_has_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/router/share/chart")]
    rows = logged(trainer)
    assert [step for step, _ in scalars] == list(rows)
    assert [v for _, v in scalars] == pytest.approx(
        [row["router/share/chart"] for row in rows.values()]
    )


def test_a_training_that_failed_leaves_nothing_behind(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=4, max_steps=8)
    step = trainer.training_step

    def failing(*args: Any, **options: Any) -> Tensor:
        return step(*args, **options) / (len(trainer.seen) < 3 or 1 // 0)

    trainer.training_step = failing
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.training_step, trainer.seen = step, []
    trainer.train()
    assert logged(trainer) == wanted(trainer.seen, 4)


def test_the_model_must_have_experts(tmp_path):
    plain = KINDS["internvl"].build()
    with pytest.raises(ValueError, match=r"^ExpertShares: model must be a mixpertized model"):
        trainer_of(tmp_path, plain)
    with pytest.raises(ValueError, match=r"^ExpertShares: model must be"), expert_shares(plain):
        pass


def test_all_processes_count(tmp_path):
    """Two processes, of which some have steps without an image."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**environment, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(PROCESSES)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(PROCESSES)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    found = [torch.load(tmp_path / f"{r}.pt") for r in range(PROCESSES)]
    assert not all(step for _, seen in found for step in seen)
    together = [joined(step) for step in zip(*(seen for _, seen in found), strict=True)]
    assert found[0][0] == found[1][0] == wanted(together, 1)


def main(folder: Path) -> None:
    model = named(KINDS["internvl"])
    trainer = trainer_of(folder, get_peft_model(model, lora_config(model, r=2)), logging_steps=1)
    trainer.train()
    torch.save((logged(trainer), trainer.seen), folder / f"{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
