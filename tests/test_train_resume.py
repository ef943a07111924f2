"""A run stopped anywhere goes on as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _recipes import data, recipe, rows, table, weights

from mixpert_kernels.training import Recipe, checkpoint, run, train
from mixpert_kernels.training.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 0
STEPS = [(stage, step) for stage in (0, 1, 2, 4) for step in (1, 2, 3)] + [(5, 20)]
# What the checkpoints of a whole run say: the stage under way, and how many of its steps are done.
PLACES = [[0, 2], [1, 0], [1, 2], [2, 0], [2, 2], [3, 0], [4, 0], [4, 2], [5, 0], [6, 0]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and an uninterrupted run in ``whole``."""
    root = data(tmp_path_factory.mktemp("resume"))
    (root / "train" / "photo" / "red" / "torn.png").write_bytes(b"\x89PNG")
    train(recipe(root, "whole"), progress=False)
    return root


class Stop(Exception):
    """Stands for whatever ends a process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Have the step numbered ``calls`` raise."""
    done = iter(range(calls))
    step = run.run_step

    def stopping(*args, **kwargs):
        if next(done, None) is None:
            raise Stop
        return step(*args, **kwargs)

    monkeypatch.setattr(run, "run_step", stopping)


def assert_same_end(root: Path, output: str) -> None:
    got, want = weights(root / output), weights(root / "whole")
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert [(r["stage_index"], r["step"]) for r in rows(root / output)] == STEPS
    assert [r.get("loss") for r in rows(root / output)] == [
        r.get("loss") for r in rows(root / "whole")
    ]
    results = [json.loads((root / o / "results.json").read_text()) for o in (output, "whole")]
    for one in results:
        one["recipe"].pop("output")
    assert results[0] == results[1]
    skipped = (root / output / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 1 and "torn.png" in skipped[0]


@pytest.mark.parametrize("calls", [0, 1, 3, 7, 10])  # with 1, 7 and 10, in the middle of a stage
def test_a_run_that_stopped_goes_on_bitwise(calls: int, root: Path, monkeypatch, capsys):
    output = f"stopped{calls}"
    with monkeypatch.context() as patch:
        stop_at(patch, calls + 1)
        with pytest.raises(Stop):
            train(recipe(root, output), progress=False)
    capsys.readouterr()
    train(recipe(root, output), progress=False)
    printed = capsys.readouterr().out
    assert ("resuming" in printed) == (calls > 0)
    if calls == 3:
        assert "after step 0 of 3 of stage knowledge" in printed
    assert_same_end(root, output)


def test_a_run_killed_at_random_moments_goes_on_bitwise(tmp_path: Path):
    data(tmp_path)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, str(here / "_kill_driver.py"), str(tmp_path), str(SEED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    for found in trials:
        assert found["killed"] and found["place"] in found["places"], found
        assert found["status"] == 0, found["log"]
        assert found["equal"] and found["tower"], found
        assert [tuple(row) for row in found["rows"]] == STEPS
        assert found["drafts"] == []
    assert_all_was_covered(trials)


def assert_all_was_covered(trials: list[dict]) -> None:
    """By the marks that a kill fell between: they do not depend on how fast a machine is."""
    steps = sum(step < 20 for _, step in STEPS)
    between = [tuple(found["between"]) for found in trials]
    assert len(between) >= 20
    assert between[0] == ("begin", "step") and between[-1] == ("all of results.json", "end")
    assert [before for before, _ in between].count("step") == steps
    writing = [
        f for f in trials if f["between"] == ["half of checkpoint.pt", "all of checkpoint.pt"]
    ]
    assert [f["place"] for f in writing] == [None, *PLACES[:-1]]  # each of them cut short
    assert all(f["left"] == [".checkpoint.pt.draft"] for f in writing)
    sure = [f["place"] for f in trials if f["places"][0] == f["places"][1]]
    assert all(place in sure for place in (None, *PLACES))


def test_what_is_drawn_at_random_goes_on_too(tmp_path: Path, monkeypatch):
    """A vision model with dropout: its draws follow from the step."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        attention_dropout=0.5,
        vision_use_head=False,
    )
    data(tmp_path)
    ends = {}
    for dropout in (0.5, 0.0):
        config.attention_dropout = dropout
        SiglipVisionModel(config).save_pretrained(tmp_path / f"siglip{dropout}")
        weights_file = tmp_path / "siglip0.5" / "model.safetensors"
        (tmp_path / f"siglip{dropout}" / "model.safetensors").write_bytes(weights_file.read_bytes())
        model = {
            "vision": str(tmp_path / f"siglip{dropout}"),
            "expert_layers": 1,
            "head": "classifier",
        }
        whole = joint(tmp_path, f"whole{dropout}", model=model)
        train(whole, progress=False)
        ends[dropout] = weights(whole.output)
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            with pytest.raises(Stop):
                train(joint(tmp_path, f"again{dropout}", model=model), progress=False)
        again = joint(tmp_path, f"again{dropout}", model=model)
        train(again, progress=False)
        got = weights(again.output)
        assert all(torch.equal(got[name], ends[dropout][name]) for name in got)
    assert not all(torch.equal(ends[0.5][name], ends[0.0][name]) for name in ends[0.0])


def test_a_clone_made_again_is_the_same(tmp_path: Path, monkeypatch):
    """Stopped between the checkpoints before and after it: the new router follows from the seed."""
    data(tmp_path)

    def settings(output: str) -> Recipe:
        return joint(
            tmp_path, output, stage=[{"name": "joint", "steps": 2, "batch": 2}, {"name": "clone"}]
        )

    train(settings("once"), progress=False)
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise Stop

        patch.setattr(run._Run, "_clone", stop)
        with pytest.raises(Stop):
            train(settings("again"), progress=False)
    train(settings("again"), progress=False)
    got, want = weights(tmp_path / "again"), weights(tmp_path / "once")
    assert want["tower.router.out.weight"].shape[0] == 3
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_features_of_another_trunk_are_not_taken(root: Path):
    stale = torch.load(root / "whole" / "router-features.pt", weights_only=True)
    (root / "stale").mkdir()
    other = {"key": "of another", "features": -stale["features"], "domains": stale["domains"]}
    torch.save(other, root / "stale" / "router-features.pt")
    train(recipe(root, "stale"), progress=False)
    assert_same_end(root, "stale")
    there = torch.load(root / "stale" / "router-features.pt", weights_only=True)
    assert there["key"] == stale["key"] and torch.equal(there["features"], stale["features"])


def test_a_finished_run_does_nothing(root: Path, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in (root / "whole").rglob("*") if p.is_file()}
    stop_at(monkeypatch, 0)
    results = train(recipe(root, "whole"), progress=False)
    assert "already; nothing to do" in capsys.readouterr().out
    assert results == json.loads((root / "whole" / "results.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in (root / "whole").rglob("*") if p.is_file()}


def test_a_changed_recipe_is_refused_and_named(root: Path):
    changed = table(root, "whole", seed=1, precision="bf16")
    changed["stage"][1] |= {"lr": 0.5}
    with pytest.raises(ValueError, match=r"changes in precision, seed, stages\[1\]\.lr;"):
        train(Recipe.from_dict(changed), progress=False)
    shorter = table(root, "whole")
    shorter["stage"].pop()
    shorter.pop("calibrate")
    with pytest.raises(ValueError, match=r"calibrate\.max_errors, stages\[5\]\.lr"):
        train(Recipe.from_dict(shorter), progress=False)
    train(recipe(root, "whole", parallel="fsdp"), progress=False)  # does not change what is trained


def joint(root: Path, output: str = "out", **changes: object) -> Recipe:
    """One stage alone, on data of ``root``."""
    made = table(root, output, stage=[{"name": "joint", "steps": 6, "batch": 2, "lr": 1e-2}])
    made.pop("calibrate")
    return Recipe.from_dict({**made, **changes})


def test_changed_data_is_refused(tmp_path: Path):
    train(joint(data(tmp_path)), progress=False)
    (tmp_path / "train" / "photo" / "red" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"data\.train must be that of the run"):
        train(joint(tmp_path), progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    train(joint(data(tmp_path)), progress=False)
    path = tmp_path / "out" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a whole checkpoint"):
        train(joint(tmp_path), progress=False)
    torch.save({"format": 7}, path)
    with pytest.raises(ValueError, match="must be of format 1, got 7"):
        train(joint(tmp_path), progress=False)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch):
    """The second of three saves meets a full disk half way."""
    data(tmp_path)
    save, calls = torch.save, iter(range(99))

    def full(state, file):
        if next(calls) == 1:
            file.write(b"x" * 4096)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(RuntimeError, match=r"the last one is as it was: .*No space left"):
            train(joint(tmp_path), progress=False)
    assert load_checkpoint(tmp_path / "out")["step"] == 2
    assert [p.name for p in (tmp_path / "out").glob(".*")] == []
    train(joint(tmp_path), progress=False)
    train(joint(tmp_path, "other"), progress=False)
    got, want = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [r["step"] for r in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("size", [1, 400_000, 4_000_000])
def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(size: int, tmp_path: Path):
    """The system itself refuses to write, at the first bytes, in the middle or in the archive's end."""
    resource = pytest.importorskip("resource")
    state = {"weight": torch.arange(1_000_000, dtype=torch.float32)}
    save_checkpoint(tmp_path, {"step": 1, **state})
    whole = (tmp_path / checkpoint.NAME).stat().st_size
    assert 400_000 < 4_000_000 < whole
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(RuntimeError, match=r"could not save .*the last one is as it was"):
            save_checkpoint(tmp_path, {"step": 2, **state})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.NAME]
    saved = load_checkpoint(tmp_path)
    assert saved["step"] == 1 and torch.equal(saved["weight"], state["weight"])


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path):
    """Drafts of a checkpoint and of the saved tower; not a tower that was about to be replaced."""
    train(joint(data(tmp_path)), progress=False)
    output = tmp_path / "out"
    (output / "results.json").unlink()
    for name in (".head.ab12cd34", "..tower.ab12cd34.ef56ab78"):
        (output / name).mkdir()
        (output / name / "model.safetensors").write_bytes(b"half")
    for name in (".checkpoint.pt.draft", ".results.json.draft"):
        (output / name).write_bytes(b"half")
    (output / "tower").rename(output / ".tower.old")
    train(joint(tmp_path), progress=False)
    assert [path.name for path in output.glob(".*")] == []
    assert (output / "tower" / "model.safetensors").is_file()


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(root: Path):
    saved = torch.load(root / "whole" / "checkpoint.pt", weights_only=True)
    assert {"recipe", "data", "stage", "step", "experts", "model", "optimizer"} <= saved.keys()
    assert saved["stage"] == 6 and saved["experts"] == 3


def test_torn_metrics_are_cut_where_the_checkpoint_is(tmp_path: Path, monkeypatch):
    data(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stop):
            train(joint(tmp_path), progress=False)
    path = tmp_path / "out" / "metrics.jsonl"
    assert [r["step"] for r in rows(tmp_path / "out")] == [1, 2, 3, 4, 5]
    path.write_text(path.read_text() + '{"stage_index": 0, "st')
    train(joint(tmp_path), progress=False)
    assert [r["step"] for r in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
