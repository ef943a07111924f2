"""MixpertTrainer: stage experts through transformers' Trainer."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from _towers import KINDS, grouped, make, pixels, refused
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixpert_kernels.hf.trainer import MixpertTrainer
from mixpert_kernels.training import ExpertOptimizer, per_expert_mean, set_stage

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = KINDS["siglip"].size
ROWS = 24


class Classifier(nn.Module):
    def __init__(self, num_experts: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.tower = make("siglip", seed, num_experts=num_experts)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor, expert: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tower(images, expert=expert).last_hidden_state.mean(1))
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        experts = self.tower.config.num_experts
        return {"loss": per_expert_mean(losses, expert, experts), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Images of the experts listed, in turn."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        self.experts, self.images = experts, pixels(ROWS, SIZE)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict:
        expert = self.experts[i % len(self.experts)]
        return {"images": self.images[i], "expert": expert, "labels": i % 4}


def arguments(folder: Path, **options: object) -> TrainingArguments:
    fields = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1,
        "max_grad_norm": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**fields, **options})


def trained(
    folder: Path, stage: str = "experts", kind: type = MixpertTrainer, experts: tuple = (0, 2),
    resume: str | None = None, **options: object,
) -> Trainer:  # fmt: skip
    model = Classifier(3 if stage == "experts" else 1)
    set_stage(model, stage)
    trainer = kind(model, arguments(folder, **options), train_dataset=Rows(experts))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_expert_that_no_batch_hit_does_not_move(tmp_path) -> None:
    trainer = trained(tmp_path)
    start, end = parameters(Classifier()), parameters(trainer.model)
    own = {f"tower.{name}" for name in grouped(trainer.model.tower)}
    for name, value in end.items():
        if name not in own:
            assert torch.equal(value, start[name]), name  # frozen
            continue
        assert [torch.equal(value[e], start[name][e]) for e in range(3)] == [False, True, False], (
            name
        )
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, ExpertOptimizer)
    assert optimizer.steps == [6, 0, 6]
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_it_is_the_loop_one_would_write(tmp_path, monkeypatch) -> None:
    """Bitwise: torch's AdamW an expert, clipped on its own, by transformers' cosine at its own count."""
    from transformers import get_scheduler

    batches = []
    step = MixpertTrainer.training_step

    def recorded(self, model, inputs, *rest):
        batches.append({key: value.clone() for key, value in inputs.items()})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(MixpertTrainer, "training_step", recorded)
    trainer = trained(tmp_path, experts=(0, 0, 0, 0, 2, 1))  # experts 1 and 2 in some batches only
    counts = [sum(bool((b["expert"] == e).any()) for b in batches) for e in range(3)]
    assert trainer.optimizer.optimizer.steps == counts
    assert min(counts) > 0 and len(set(counts)) > 1
    model = Classifier()
    set_stage(model, "experts")
    like = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    factor = get_scheduler("cosine", like, 2, 6).lr_lambdas[0]

    def make_groups(tensors: list[Tensor]) -> torch.optim.Optimizer:
        groups = [
            {"params": [t for t in tensors if t.ndim > 1], "weight_decay": 0.1},
            {"params": [t for t in tensors if t.ndim < 2], "weight_decay": 0.0},
        ]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
        assert kind is torch.optim.AdamW
        return kind(groups, **options)

    optimizer = ExpertOptimizer(model.train(), make_groups, max_norm=0.05, schedule=factor)
    for batch in batches:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    want = parameters(model)
    for name, value in parameters(trainer.model).items():
        assert torch.equal(value, want[name]), name


def test_it_resumes_from_its_checkpoint(tmp_path) -> None:
    whole = trained(tmp_path / "whole")
    saved = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "part", **saved, **{"save_total_limit": 5})
    resumed = trained(tmp_path / "again", resume=str(tmp_path / "part" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert resumed.optimizer.optimizer.steps == [6, 0, 6]
    want = parameters(whole.model)
    assert all(torch.equal(value, want[n]) for n, value in parameters(resumed.model).items())
    assert not all(torch.equal(v, want[n]) for n, v in parameters(Classifier()).items())


@pytest.mark.parametrize("stage", ["alignment", "joint"])
def test_in_other_stages_it_is_the_plain_trainer(stage: str, tmp_path) -> None:
    ours = trained(tmp_path / "a", stage, experts=(0,))
    plain = trained(tmp_path / "b", stage, Trainer, experts=(0,))
    assert type(ours.optimizer.optimizer) is type(plain.optimizer.optimizer) is torch.optim.AdamW
    want = parameters(plain.model)
    assert all(torch.equal(value, want[n]) for n, value in parameters(ours.model).items())
    assert ours.args.max_grad_norm == 0.05
    keys = [
        {k: e[k] for k in ("loss", "grad_norm", "learning_rate") if k in e}
        for e in ours.state.log_history
    ]
    other = [
        {k: e[k] for k in ("loss", "grad_norm", "learning_rate") if k in e}
        for e in plain.state.log_history
    ]
    assert keys == other


def test_the_schedule_runs_on_each_experts_own_count(tmp_path) -> None:
    rates: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            rates.append((dict(optimizer.optimizer.last_rates), list(optimizer.optimizer.steps)))

    model = Classifier()
    set_stage(model, "experts")
    args = arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=0)
    trainer = MixpertTrainer(
        model, args, train_dataset=Rows((0, 0, 0, 0, 0, 1)), callbacks=[Watch()]
    )
    trainer.train()
    assert args.max_grad_norm == 0.05  # the caller's are as they were
    for last, steps in rates:
        for e, name in ((0, "expert_0"), (1, "expert_1")):
            if name in last:
                assert last[name] == pytest.approx(1e-2 * (6 - (steps[e] - 1)) / 6)
    assert any("expert_1" not in last for last, _ in rates)
    logged = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    assert logged == pytest.approx([max(last.values()) for last, _ in rates])


def test_gradients_accumulate(tmp_path) -> None:
    trainer = trained(
        tmp_path, max_steps=2, gradient_accumulation_steps=2, experts=(0, 0, 0, 0, 1, 1, 1, 1)
    )
    assert trainer.optimizer.optimizer.steps[2] == 0
    assert sum(trainer.optimizer.optimizer.steps[:2]) >= 2


def test_a_skipped_step_leaves_no_hits(tmp_path, monkeypatch) -> None:
    """As the gradient scaler skips one: the images of that batch must not count in the next."""
    from accelerate.optimizer import AcceleratedOptimizer

    step, seen = AcceleratedOptimizer.step, []

    def skipping(self, closure=None):
        seen.extend(self.optimizer._hit_experts())
        if seen[-1][1]:  # a batch with an image of expert 1
            return
        step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", skipping)
    trainer = trained(tmp_path, experts=(0, 0, 0, 0, 0, 1))
    assert {tuple(hits) for hits in seen} == {(1, 0, 0), (1, 1, 0)}
    assert seen.index([1, 1, 0]) < len(seen) - 1 - seen[::-1].index([1, 0, 0])  # one after another
    assert trainer.optimizer.optimizer.steps == [seen.count([1, 0, 0]), 0, 0]


def test_what_cannot_step_experts_apart_is_refused(tmp_path) -> None:
    model = Classifier()
    set_stage(model, "experts")

    def trainer(**options: object) -> MixpertTrainer:
        return MixpertTrainer(
            model, arguments(tmp_path, **options), train_dataset=Rows((0,)), eval_dataset=Rows((0,))
        )

    refused(
        trainer(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch").train,
        "lr_scheduler_type must be a function of the step",
    )
    sharded = trainer()
    sharded.is_fsdp_enabled = True
    refused(sharded.create_optimizer, "MixpertTrainer: fsdp must be off in stage experts")
    given = MixpertTrainer(
        model, arguments(tmp_path), train_dataset=Rows((0,)),
        optimizer_cls_and_kwargs=(functools.partial(torch.optim.SGD), {"lr": 0.1}),
    )  # fmt: skip
    refused(
        given.create_optimizer, "MixpertTrainer: optim must name an optimizer of a list of tensors"
    )
    stock = MixpertTrainer(
        model, arguments(tmp_path), train_dataset=Rows((0,)),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="must be an ExpertOptimizer"):
        stock.train()
