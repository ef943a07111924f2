"""MoME's recipe from end to end: two stages, stopped and gone on with, in one process and in two."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _mome_recipes import TASKS, mome_table, tiny_mome
from _recipes import rows, weights
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixpert_kernels import cli
from mixpert_kernels.hf import mome
from mixpert_kernels.hf.mome.learner import MomeLearner, build_learner
from mixpert_kernels.modules import AdaptiveDeformableTransform
from mixpert_kernels.modules.mole import ADAPTER
from mixpert_kernels.training import Recipe, run, set_mome_stage, train
from mixpert_kernels.training.adapter_optimizer import AdapterOptimizer
from mixpert_kernels.training.data import read_images
from mixpert_kernels.training.prepare import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "training.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, and a whole run in ``whole``."""
    root = tmp_path_factory.mktemp("mome")
    tiny_mome.write_data(root)
    tiny_mome.write_models(root)
    train(Recipe.from_dict(mome_table(root, "whole")), progress=False)
    return root


@pytest.fixture
def learner(root: Path) -> tuple[MomeLearner, dict[str, Tensor], dict]:
    """A model as built, with two samples of different tasks: targets and images."""
    torch.manual_seed(0)
    learner, processor = build_learner(Recipe.from_dict(mome_table(root)).model)
    images = read_images(root / "train.jsonl", "instruction", None)
    assert [s.domain for s in images.samples[:2]] == list(TASKS)
    pixels = processor([images.open(i) for i in (0, 1)])
    return learner, learner.targets(images.samples[:2]), pixels


def test_what_a_run_leaves(root: Path):
    left = {path.name for path in (root / "whole").iterdir()} - {"tensorboard"}
    assert left == {"checkpoint.pt", "metrics.jsonl", "model", "results.json"}
    results = json.loads((root / "whole" / "results.json").read_text())
    assert results["tasks"] == sorted(TASKS) and results["branches"] == ["clip", "dino", "pix"]
    assert {name: row["images"] for name, row in results["domains"].items()} == {
        "shade": 8,
        "tint": 8,
    }
    model = mome.load(root / "whole" / "model")
    state = {f"model.{name}": p for name, p in model.own_parameters().items()}
    saved = weights(root / "whole")
    assert state.keys() == saved.keys()  # neither LLM nor encoders are in the checkpoint
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    routes = mome.route(root / "whole" / "model", list(TASKS.values()))
    for i, task in enumerate(TASKS):
        want = dict(zip(routes.branches, routes.weights[i].tolist(), strict=True))
        assert results["weights"][task] == pytest.approx(want, abs=1e-6)
    for layer, shares in results["experts"].items():
        chosen = routes.experts[:, int(layer.removeprefix("layer_"))].tolist()
        assert list(shares.values()) == [chosen.count(k) / 2 for k in range(3)]


def test_the_page_works_as_printed(root: Path, monkeypatch, capsys):
    """The recipe by the command line, then the code that reads what it left."""
    monkeypatch.chdir(root)
    section = PAGE.read_text().partition("## MoME")[2]
    Path("page.toml").write_text(re.search(r"```toml\n(.*?)```", section, re.DOTALL)[1])
    assert cli.main(["train", "page.toml", "--no-progress"]) == 0
    assert "saved     " in capsys.readouterr().out
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    answer, _, weights = capsys.readouterr().out.partition("\n")
    assert set(answer.split()) <= {*tiny_mome.WORDS, "<unk>"} and weights.startswith("tensor([[")


def test_rows_of_metrics(root: Path):
    found = rows(root / "whole")
    assert [(r["stage"], r["step"]) for r in found] == [
        (stage, step) for stage in ("move", "mole") for step in (1, 2, 3, 4)
    ]
    for row in found:
        tokens = row["loss_of"].keys()
        assert tokens == row["share"].keys() == row["weights"].keys() and row["images"] == 4
        for of in row["weights"].values():
            assert sum(of.values()) == pytest.approx(1)
        assert ("experts" in row) == (row["stage"] == "mole")
        for of in row.get("experts", {}).values():
            assert sum(of.values()) == pytest.approx(1) and len(of) == 3
    rates = [row["lr"]["shared"] for row in found[:4]]
    assert rates == pytest.approx([1e-2, 1e-2, 0.75e-2, 0.25e-2])  # warm-up 1, then a cosine over 3


@pytest.mark.parametrize(
    "calls", [3, 4, 7]
)  # after a checkpoint in move, behind the clone, in mole
def test_a_run_that_stopped_goes_on_bitwise(calls: int, root: Path, monkeypatch):
    class Stop(Exception):
        pass

    true, done = run.run_step, iter(range(calls))

    def stopping(*args):
        if next(done, None) is None:
            raise Stop
        return true(*args)

    settings = Recipe.from_dict(mome_table(root, f"stopped{calls}"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_step", stopping)
        with pytest.raises(Stop):
            train(settings, progress=False)
    saved = torch.load(settings.output / "checkpoint.pt", weights_only=True)
    assert [saved["stage"], saved["step"]] == {3: [0, 3], 4: [2, 0], 7: [2, 3]}[calls]
    train(settings, progress=False)
    got, want = weights(settings.output), weights(root / "whole")
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [r["loss"] for r in rows(settings.output)] == [r["loss"] for r in rows(root / "whole")]


def test_stage_two_starts_as_copies_of_stage_one(root: Path, learner):
    model, targets, images = learner
    one = Recipe.from_dict(mome_table(root, "one", stage=mome_table(root)["stage"][:1]))
    train(one, progress=False)
    load_weights(model, weights(one.output), _frozen(model))
    before = model(images, **targets)
    assert model.model.layers[0].up.any()
    set_mome_stage(model, "clone", num_experts=3)
    for layer in model.model.layers:
        for name in ADAPTER:
            parameter = getattr(layer, name)
            assert len(parameter) == 3 and torch.equal(
                parameter, parameter[:1].expand_as(parameter)
            )
    for stage in (None, "mole"):
        if stage:
            set_mome_stage(model, stage)
        after = model(images, **targets)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def _frozen(model: MomeLearner) -> set[str]:
    from mixpert_kernels.training.mome_stages import frozen_names

    return frozen_names(model)


def test_what_trains_and_what_is_in_training_mode(learner):
    model, targets, images = learner
    for stage, adapters in (("move", 1), ("mole", 3)):
        if stage == "mole":
            set_mome_stage(model, "clone", num_experts=3)
        set_mome_stage(model, stage)
        model.train()
        groups = set(model.model.trainable())
        wanted = {"transforms", "projections", "move_router", "adapters"}
        assert groups == wanted | ({"mole_routers"} if adapters > 1 else set())
        transforms = [m for m in model.modules() if isinstance(m, AdaptiveDeformableTransform)]
        assert len(transforms) == 2 and all(m.training for m in transforms)
        assert not any(b.encoder.training for b in model.model.move.branches.values())
        assert not any(m.training for m in model.model.llm.modules())
        model(images, **targets).losses.sum().backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None}
        assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(layer.router[0].weight.grad is not None for layer in model.model.layers)


def test_the_loss_is_on_the_answer_alone(root: Path, learner):
    model, targets, images = learner
    out = model.eval()(images, **targets)
    tokens, answer = targets["tokens"], targets["labels"] != -100
    assert answer.sum(1).tolist() == [2, 2] == out.counts.tolist()  # a word and the end token
    text = model.tokenizer.batch_decode([t[a] for t, a in zip(tokens, answer, strict=True)])
    assert text == ["red </s>", "dark </s>"]
    got = model.model(tokens, targets["mask"], images=images, instructions=list(TASKS.values()))
    logits = got.logits[:, -tokens.shape[1] - 1 : -1]
    for i in range(2):
        want = cross_entropy(logits[i][answer[i]], tokens[i][answer[i]], reduction="sum")
        torch.testing.assert_close(out.losses[i], want)


@pytest.mark.parametrize("optimizer", ["adapters", "stock"])
def test_adapters_that_no_sample_chose_stay(optimizer: str, learner):
    """With momentum from an earlier batch, and weight decay; a stock optimizer moves them."""
    model, targets, images = learner
    set_mome_stage(model, "clone", num_experts=3)
    set_mome_stage(model, "mole")
    layers = model.model.layers
    of = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    ours, slower = optimizer == "adapters", (lambda made: 1 / (1 + made))
    made = AdapterOptimizer(model, of, schedule=slower) if ours else of(model.parameters())
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.router.parameters()):
            parameter.zero_()
        for step, bias in enumerate(([0, 1, 0], [0, 0, 1])):  # both layers to 1, then 1 and 2
            layers[1].router[2].bias.copy_(torch.tensor(bias))
            layers[0].router[2].bias.copy_(torch.tensor([0, 1, 0]))
            before = [{n: getattr(x, n).detach().clone() for n in ADAPTER} for x in layers]
            made.zero_grad()
            with torch.enable_grad():
                model(images, **targets).losses.sum().backward()
            made.step()
            for layer, old in zip(layers, before, strict=True):
                chosen = 2 if (layer is layers[1] and step) else 1
                for name in ADAPTER:
                    same = (getattr(layer, name) == old[name]).reshape(3, -1).all(1).tolist()
                    moved = [not s for s in same]
                    if ours:
                        assert moved[chosen] or name.startswith("down"), name
                        assert not any(m for k, m in enumerate(moved) if k != chosen), name
                    elif name == "down":
                        assert all(moved)
    if ours:
        assert made.steps == [0, 2, 0, 0, 1, 1]
        rates = {"layer_0.expert_1": 0.05, "layer_1.expert_2": 0.05, "shared": 0.05}
        assert made.last_rates == rates  # the same for one that steps for the first time


def launch(root: Path, *argv: str) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "--local-addr", "127.0.0.1", str(HERE / "_train_worker.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=env, cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_two_processes_train_what_one_does(root: Path):
    """With a batch of one the second process has no image; with two, each its own adapters."""
    plan = []
    for name, batch in (("none", 1), ("each", 2)):
        given = {"batch": batch, "steps": 3, "optimizer": "sgd", "lr": 0.05, "warmup": 0}
        stage = [{"name": "move", **given}, {"name": "clone"}, {"name": "mole", **given}]
        made = mome_table(root, f"two-{name}", stage=stage)
        made["model"]["mome"]["options"]["dropout"] = 0.0  # drawn by each process for itself
        plan.append(made)
    (root / "plan.json").write_text(json.dumps(plan))
    launch(root, str(root / "plan.json"))
    for made in plan:
        output = Path(made["output"])
        alone = {**made, "output": f"{output}-alone"}
        train(Recipe.from_dict(alone), progress=False)
        got, want = weights(output), weights(Path(alone["output"]))
        assert list(got) == list(want)
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)
        for one, other in zip(rows(output), rows(Path(alone["output"])), strict=True):
            assert one.get("experts") == other.get("experts")
            assert one["weights"].keys() == other["weights"].keys()
        images = [json.loads((output / f"counts{rank}.json").read_text()) for rank in (0, 1)]
        assert max(images[1]["images"]) == (0 if output.name == "two-none" else 1)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"language": "none"}, "model.language must be a directory"),
        ({"sentence": "none"}, "model.mome.sentence must be a directory"),
        ({"encoders": {"clip": "none"}}, "model.mome.encoders.clip must be a directory"),
        ({"encoders": {"clip": "llm"}}, "clip"),
        ({"encoders": {"clip": "bare"}}, "model.mome.encoders.clip must have an image processor"),
        ({"options": {"heads": 3}}, "heads"),
    ],
)
def test_models_that_are_not_there_are_named(change: dict, text: str, root: Path):
    if not (root / "bare").exists():
        (root / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (root / "bare" / name).write_bytes((root / "clip" / name).read_bytes())
    made = mome_table(root, "wrong")
    for key, value in change.items():
        place = made["model"] if key == "language" else made["model"]["mome"]
        if key == "options":
            place[key] = value
        elif isinstance(value, dict):
            place[key] = {k: str(root / v) for k, v in value.items()}
        else:
            place[key] = str(root / value)
    with pytest.raises(ValueError) as error:
        train(Recipe.from_dict(made), progress=False)
    assert text in str(error.value) and not (root / "wrong").exists()


def test_data_without_instructions_is_named(root: Path):
    good = json.loads((root / "train.jsonl").read_text().splitlines()[0])
    for name, row, text in (
        ("none", {k: v for k, v in good.items() if k != "instruction"}, "a column instruction"),
        ("empty", {**good, "instruction": " "}, "instruction must not be empty"),
        ("answer", {k: v for k, v in good.items() if k != "text"}, "a column text"),
        ("task", {**good, "domain": "colour"}, "must be one of shade, tint, got colour"),
    ):
        path = root / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = {"test" if name == "task" else "train": str(path)}
        with pytest.raises(ValueError) as error:
            train(Recipe.from_dict(mome_table(root, "wrong", data=data)), progress=False)
        assert text in str(error.value) and not (root / "wrong").exists()
    one = {k: v for k, v in good.items() if k != "domain"}
    (root / "one.jsonl").write_text(json.dumps(one) + "\n")
    assert read_images(root / "one.jsonl", "instruction", None).samples[0].domain == "all"
    (root / "folder" / "tint").mkdir(parents=True)
    (root / "folder" / "tint" / "0.png").write_bytes((root / good["image"]).read_bytes())
    (root / "folder" / "tint" / "0.txt").write_text("\nred")
    with pytest.raises(ValueError, match="caption must begin with an instruction"):
        read_images(root / "folder", "instruction", None)
