"""The recipe from end to end, and what stops it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from _recipes import (
    EXPERTS,
    data,
    labelled_folder,
    recipe,
    rows,
    stages,
    table,
    weights,
)
from torch import nn

from mixpert_kernels import cli
from mixpert_kernels.hf import heads
from mixpert_kernels.hf.heads import Classifier
from mixpert_kernels.hf.loading import load_preprocessing
from mixpert_kernels.training import Recipe, fit_router, metrics, run, step, train
from mixpert_kernels.training.batches import Order
from mixpert_kernels.training.data import read_images

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of all stages in ``out``."""
    root = data(tmp_path_factory.mktemp("train"))
    train(recipe(root, stage=stages(steps=4)), progress=False)
    return root


def joint(root: Path, output: str = "joint", **changes: object) -> Recipe:
    """Three steps of one stage."""
    made = table(root, output, stage=[{"name": "joint", "steps": 3, "batch": 4, "lr": 1e-2}])
    made.pop("calibrate")
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return Recipe.from_dict(made)


# from end to end


def test_what_a_run_leaves(root: Path):
    left = {path.name for path in (root / "out").iterdir()}
    wanted = {"checkpoint.pt", "metrics.jsonl", "tower", "head", "results.json"}
    wanted |= {"calibration.json", "calibration.png", "router-features.pt", "routing.png"}
    assert left - {"tensorboard"} == wanted
    results = json.loads((root / "out" / "results.json").read_text())
    assert set(results["domains"]) == {"photo", "chart"}
    columns = ["images", "versatile", "teacher", "router", "routed_right", "fell_back"]
    assert all(sorted(row) == sorted(columns) for row in results["domains"].values())
    curve = json.loads((root / "out" / "calibration.json").read_text())
    assert len(curve["curve"]) == 101 and curve["images"] == 12
    assert (root / "out" / "calibration.png").stat().st_size > 5000
    model = Classifier.from_run(root / "out")
    assert model.tower.config.delta == curve["value"]
    assert model.tower.config.expert_names == EXPERTS and model.classes == ["blue", "red"]


def test_results_are_those_of_the_saved_model(root: Path):
    """Each image alone through what was saved."""
    model = Classifier.from_run(root / "out")
    images = read_images(root / "test", "label", EXPERTS)
    preprocess = load_preprocessing(root / "out" / "tower", model.tower.config.vision_config)
    found: dict[str, list] = {name: [] for name in EXPERTS}
    for i, sample in enumerate(images.samples):
        domain, pixels = EXPERTS.index(sample.domain), preprocess([images.open(i)])
        right = []
        for expert in (torch.tensor([0]), torch.tensor([domain]), None):
            with torch.no_grad():
                out = model.tower(pixels, expert=expert)
                logits = model.logits(out.last_hidden_state)
            right.append(model.classes[int(logits.argmax())] == sample.label)
        chosen = int(out.expert)
        found[sample.domain].append([*right, chosen == domain, chosen == 0])
    results = json.loads((root / "out" / "results.json").read_text())["domains"]
    for name, row in results.items():
        shares = torch.tensor(found[name]).double().mean(0).tolist()
        columns = ("versatile", "teacher", "router", "routed_right", "fell_back")
        assert [row[c] for c in columns] == pytest.approx(shares)
        assert row["images"] == len(found[name])


def test_rows_of_metrics(root: Path):
    found = rows(root / "out")
    assert [row["total_step"] for row in found] == [*range(1, 17), 36]
    for row in found[:-1]:
        assert sum(row["share"].values()) == pytest.approx(1) and row["images"] == 4
        assert row["share"].keys() == row["loss_of"].keys()
        assert math.isfinite(row["loss"]) and row["images_per_s"] > 0 and row["skipped"] == 0
    experts = [row for row in found if row["stage"] == "experts"]
    for row in experts:
        assert row["loss"] == pytest.approx(sum(row["loss_of"].values()))
        assert row["norm"].keys() == row["share"].keys()  # those hit, and no shared parameters
    joint_rows = [row for row in found if row["stage"] == "joint"]
    assert [row["lr"]["versatile"] for row in joint_rows] == pytest.approx(
        [1e-2 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    )


def test_tensorboard_has_the_rows(root: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "out" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("joint/loss")]
    want = [(r["total_step"], r["loss"]) for r in rows(root / "out") if r["stage"] == "joint"]
    assert losses == [(step, pytest.approx(loss)) for step, loss in want]


def test_the_router_learnt_from_the_file_of_features(root: Path):
    saved = torch.load(root / "out" / "router-features.pt", weights_only=True)
    tower = Classifier.from_run(root / "out").tower
    assert saved["features"].shape == (12, 16)
    want = {name: value.clone() for name, value in tower.router.state_dict().items()}
    seed = run.derive(0, "router", 5)
    fit_router(tower, saved["features"], saved["domains"], steps=20, lr=1e-2, seed=seed)
    for name, value in tower.router.state_dict().items():
        assert torch.equal(value, want[name]), name


def test_it_learns(tmp_path: Path):
    data(tmp_path, each=4)
    given = [
        {**s, "steps": 40, "batch": 8} if s["name"] == "joint" else s for s in stages(steps=10)
    ]
    given[-1]["steps"] = 200
    results = train(recipe(tmp_path, stage=given), progress=False)
    for row in results["domains"].values():
        assert min(row["teacher"], row["router"], row["routed_right"]) == 1.0
    assert results["mean"]["teacher"] == 1.0


def test_what_experts_and_router_may_not_move_stays(tmp_path: Path):
    """Against the recipe that ends after clone: trunk and head bitwise the same, expert 0 too without its images."""
    data(tmp_path)
    early = table(tmp_path, "early", stage=stages()[:4])
    early.pop("calibrate")
    train(Recipe.from_dict(early), progress=False)
    train(recipe(tmp_path, "late"), progress=False)
    before, after = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("early", "late")
    )
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(re.match(r"tower\.(experts|projector|router)\.", name) for name in moved)
    for name in moved:
        if not name.startswith("tower.router"):
            assert torch.equal(before[name][0], after[name][0]), name
            assert not torch.equal(before[name][1], after[name][1]), name


def test_a_stage_is_the_loop_one_would_write(tmp_path: Path):
    """AdamW in plain PyTorch over the same batches: mean loss, cosine, warm-up, decay of matrices, clipping."""
    stage = {"name": "joint", "steps": 5, "batch": 4, "lr": 1e-2, "max_norm": 0.5, "warmup": 2}
    settings = joint(data(tmp_path), stage=[{**stage, "weight_decay": 0.3}])
    train(settings, progress=False)
    run.seed_everything(settings.seed, "model")
    model, preprocess = heads.build(settings.model, ["blue", "red"])
    images = read_images(settings.data.train, "label", EXPERTS)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("tower.router")}
    inside = [p for n, p in trained.items() if n.startswith(("tower.experts", "tower.projector"))]
    outside = [p for p in trained.values() if not any(p is q for q in inside)]
    rows_of = [p.ndim - 1 if any(p is q for q in inside) else p.ndim for p in trained.values()]
    groups = [
        {
            "params": [
                p for p, n in zip(trained.values(), rows_of, strict=True) if (n > 1) == wide
            ],
            "weight_decay": 0.3 * wide,
        }
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    batches = Order(settings.seed, 0, len(images)).batches(4)
    for factor in (0.5, 1.0, 1.0, 0.75, 0.25):  # warm-up by halves, then (1 + cos(pi k / 3)) / 2
        batch = next(batches)
        pixels = preprocess([images.open(i) for i in batch])
        labels = torch.tensor([["blue", "red"].index(images.samples[i].label) for i in batch])
        features = model.train().tower(pixels, expert=torch.zeros(4, dtype=torch.int64))
        logits = model.head(features.last_hidden_state.mean(1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        for part in (inside, outside):
            nn.utils.clip_grad_norm_(part, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
    got = weights(settings.output)
    for name, value in trained.items():
        if (
            "k_proj.bias" not in name
        ):  # its gradient is rounding alone, of which AdamW makes whole steps
            torch.testing.assert_close(got[name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_the_documented_recipe_runs_as_it_stands(tmp_path: Path, capsys):
    text = re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    (tmp_path / "config.toml").write_text(text)
    for name in ("train", "test", "held_out"):
        labelled_folder(tmp_path / "images" / name, 4, ("photo", "chart", "document"))
    assert cli.main(["train", str(tmp_path / "config.toml"), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    for name in ("alignment", "joint", "clone", "experts", "router"):
        assert f"stage {name}" in printed
    header = next(line for line in printed.splitlines() if line.startswith("domain"))
    assert header.split()[:3] == ["domain", "images", "teacher"]
    results = json.loads((tmp_path / "runs" / "first" / "results.json").read_text())
    assert results["mean"]["teacher"] > 0.9


def test_bf16_trains_and_keeps_float32_parameters(tmp_path: Path):
    results = train(recipe(data(tmp_path), precision="bf16"), progress=False)
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["model"]
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    assert set(results["domains"]) == {"photo", "chart"}
    plain = train(recipe(tmp_path, "plain"), progress=False)
    assert plain["recipe"]["precision"] == "fp32"
    for got, want in zip(rows(tmp_path / "out")[:3], rows(tmp_path / "plain")[:3], strict=True):
        assert got["loss"] != want["loss"]  # another arithmetic
        assert got["loss"] == pytest.approx(want["loss"], rel=0.05)  # of about 2^-8 a product


def test_workers_decode_what_the_process_itself_does(tmp_path: Path):
    data(tmp_path)
    (tmp_path / "train" / "chart" / "red" / "torn.png").write_bytes(b"")
    for workers in (0, 2):
        train(joint(tmp_path, f"w{workers}", data={"workers": workers}), progress=False)
    one, two = (rows(tmp_path / f"w{workers}") for workers in (0, 2))
    assert [row["loss"] for row in one] == [row["loss"] for row in two]
    assert (tmp_path / "w0" / "skipped.jsonl").read_text() == (
        tmp_path / "w2" / "skipped.jsonl"
    ).read_text()


# what stops it


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_file_is_refused(below: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ValueError, match=r"^train: output must be a directory, got the file .*file$"
    ):
        train(joint(data(tmp_path), f"file/{below}"), progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unreadable_image_is_skipped_and_listed_once(tmp_path: Path, capsys):
    data(tmp_path, each=1)
    torn = tmp_path / "train" / "photo" / "red" / "torn.png"
    torn.write_bytes((tmp_path / "train" / "photo" / "red" / "0.png").read_bytes()[:-30])
    results = train(recipe(tmp_path), progress=False)
    printed = capsys.readouterr().out
    assert printed.count(f"skipped   {torn}") == 1 and results["skipped"] == 1
    listed = [
        json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [row["path"] for row in listed] == [str(torn)] and listed[0]["reason"]
    skipping = [row for row in rows(tmp_path / "out") if row.get("skipped")]
    assert skipping and all(row["images"] + row["skipped"] == 4 for row in skipping)


def test_an_unreadable_image_ends_the_run_where_it_shall(tmp_path: Path):
    data(tmp_path, each=1)
    (tmp_path / "train" / "photo" / "red" / "torn.png").write_bytes(b"")
    settings = joint(tmp_path, data={"on_bad_image": "fail"})
    with pytest.raises(ValueError, match=r"torn\.png must be a readable image, got: "):
        train(settings, progress=False)
    assert not (settings.output / "skipped.jsonl").exists()


def test_a_batch_of_unreadable_images_is_no_step(tmp_path: Path):
    data(tmp_path, each=1)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    settings = joint(tmp_path)
    train(settings, progress=False)
    assert [row["images"] for row in rows(settings.output)] == [0, 0, 0]
    assert all(row["loss"] == 0 and row["lr"] == {} for row in rows(settings.output))
    run.seed_everything(settings.seed, "model")
    model, _ = heads.build(settings.model, ["blue", "red"])
    for name, value in weights(settings.output).items():
        assert torch.equal(value, model.state_dict()[name]), name  # not decayed either


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path):
    data(tmp_path)
    stage = {"name": "joint", "steps": 9, "batch": 4, "lr": 1e30, "optimizer": "sgd", "max_norm": 0}
    settings = joint(tmp_path, stage=[stage], checkpoint_every=1)
    with pytest.raises(
        RuntimeError, match=r"loss must be finite, got .* at step (\d) of stage joint"
    ) as error:
        train(settings, progress=False)
    stopped = int(re.search(r"step (\d)", str(error.value))[1])
    found = json.loads((settings.output / "nan-batch.json").read_text())
    assert found["step"] == stopped > 1 and found["stage"] == "joint" and len(found["images"]) == 4
    assert all(Path(row["image"]).is_file() for row in found["images"])
    assert [row["step"] for row in rows(settings.output)] == list(range(1, stopped))
    saved = torch.load(settings.output / "checkpoint.pt", weights_only=True)
    assert saved["step"] == stopped - 1
    left = {path.name for path in settings.output.iterdir()}
    assert left - {"tensorboard"} == {"checkpoint.pt", "metrics.jsonl", "nan-batch.json"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    """The loss was finite; the step that followed from it is not."""
    stage = {
        "name": "joint",
        "steps": 1,
        "batch": 4,
        "lr": 1e30,
        "optimizer": "sgd",
        "weight_decay": 1e30,
    }
    settings = joint(data(tmp_path), stage=[stage, {**stage, "lr": 1e-2}])
    with pytest.raises(
        RuntimeError, match=r"weights must be finite to be saved, got .* after step 0"
    ):
        train(settings, progress=False)
    assert not (settings.output / "checkpoint.pt").exists()


def test_the_named_batch_is_the_one_whose_loss_was_not_finite(tmp_path: Path, monkeypatch):
    data(tmp_path)
    seen = []
    true = step._losses

    def poisoned(model, runner, optimizer, batch, *rest):
        seen.append([sample.name for sample in batch.samples])
        losses, counts = true(model, runner, optimizer, batch, *rest)
        return (losses * float("nan") if len(seen) == 2 else losses), counts

    monkeypatch.setattr(step, "_losses", poisoned)
    settings = joint(tmp_path)
    with pytest.raises(RuntimeError, match="got nan at step 2"):
        train(settings, progress=False)
    found = json.loads((settings.output / "nan-batch.json").read_text())
    assert [row["image"] for row in found["images"]] == seen[1] != seen[0]


def test_tensorboard_missing_is_a_notice(tmp_path: Path, monkeypatch, capsys):
    data(tmp_path)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    train(joint(tmp_path), progress=False)
    assert "tensorboard is not installed" in capsys.readouterr().out
    assert len(rows(tmp_path / "joint")) == 3


def test_data_that_does_not_fit_the_recipe_stops_before_any_work(tmp_path: Path):
    data(tmp_path)
    for name, changes, text in (
        ("domain", {"data": {"experts": ["versatile", "photo"]}}, "got chart at"),
        ("empty", {"data": {"experts": [*EXPERTS, "document"]}}, "images of domain document"),
        ("label", {}, "must be one that the training data has, got green"),
        ("missing", {"data": {"train": str(tmp_path / "none")}}, "data must be a folder"),
    ):
        if name == "label":
            labels = tmp_path / "test" / "photo"
            (labels / "red").rename(labels / "green")
        with pytest.raises(ValueError) as error:
            train(recipe(tmp_path, name, **changes), progress=False)
        assert text in str(error.value) and not (tmp_path / name).exists()
        if name == "label":
            (labels / "green").rename(labels / "red")
