"""Saving: all or nothing, where it is told, and nothing of anybody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from _towers import (
    KINDS,
    WIDTH,
    assert_close,
    error,
    make,
    pixels,
    refused,
    run,
    tell_apart,
)

from mixpert_kernels import FusedMixpertTower, MixpertVisionConfig
from mixpert_kernels.hf import checkpoint

ROUTES = [2, 0, 1]
WEIGHTS = "model.safetensors"


def features(tower: FusedMixpertTower, kind: str = "siglip") -> torch.Tensor:
    return run(tower.eval(), pixels(3, KINDS[kind].size), ROUTES)


def load(path: Path, **options: object) -> FusedMixpertTower:
    return FusedMixpertTower.from_pretrained(path, **options)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, FusedMixpertTower]:
    tower = make("siglip")
    tower.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower", tower


POINTS = ["safetensors", "config", "first rename", "second rename", "chmod"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_checkpoint(point, kind, saved, monkeypatch) -> None:
    path, tower = saved
    (path / "preprocessor_config.json").write_text("{}")
    want = features(tower)
    newer = tell_apart(make("siglip"), 40)
    assert error(features(newer), want) > 1e-2

    def interrupt(*_: object, **__: object) -> None:
        raise kind("interrupted")

    renames = []

    def second(*args: object) -> None:
        renames.append(args)
        if len(renames) == 2:
            interrupt()
        return replace(*args)

    replace = os.replace
    with monkeypatch.context() as patch:
        if point == "safetensors":
            patch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
        elif point == "config":
            patch.setattr(MixpertVisionConfig, "save_pretrained", interrupt)
        elif point == "chmod":
            patch.setattr(checkpoint.os, "chmod", interrupt)
        else:
            patch.setattr(checkpoint.os, "replace", interrupt if "first" in point else second)
        with pytest.raises(kind):
            newer.save_pretrained(path)
    assert path.is_dir()
    assert_close(features(load(path)), want)
    newer.save_pretrained(path)  # and the next save goes through
    assert_close(features(load(path)), features(newer))
    assert (path / "preprocessor_config.json").read_text() == "{}"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


KILLED = textwrap.dedent("""
    import os, signal, sys
    from mixpert_kernels import FusedMixpertTower
    from mixpert_kernels.hf import checkpoint
    import transformers.modeling_utils as modeling

    path, point = sys.argv[1:]
    tower = FusedMixpertTower.from_pretrained(path)
    for parameter in tower.parameters():
        parameter.data.zero_()
    calls = []

    def before(function, number):
        def call(*args, **options):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call

    if point == "shard":
        modeling.safe_save_file = before(modeling.safe_save_file, 2)
    elif point == "rename":
        checkpoint.os.replace = before(os.replace, 1)
    else:
        checkpoint.os.replace = before(os.replace, 2)
    tower.save_pretrained(path, max_shard_size="20KB")
""")


@pytest.mark.parametrize("point", ["shard", "rename", "between the renames"])
def test_a_killed_save_leaves_the_old_checkpoint(point: str, saved) -> None:
    path, tower = saved
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), point], env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert_close(features(load(path)), features(tower))
    tower.save_pretrained(path)
    assert_close(features(load(path)), features(tower))


def test_a_smaller_save_leaves_no_old_shards(tmp_path: Path) -> None:
    tower = make("siglip")
    tower.save_pretrained(tmp_path, max_shard_size="20KB")
    tower.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_other_files_in_the_directory_are_kept(saved) -> None:
    path, tower = saved
    (path / "processor").mkdir()
    (path / "processor" / "notes.txt").write_text("mine")
    (path / "adapter_model.safetensors").write_bytes(b"another's")
    tower.save_pretrained(path)
    assert (path / "processor" / "notes.txt").read_text() == "mine"
    assert (path / "adapter_model.safetensors").read_bytes() == b"another's"


def test_only_the_main_process_writes(saved) -> None:
    """As distributed training calls it on every rank."""
    path, tower = saved
    before = sorted((p.name, p.stat().st_mtime_ns) for p in path.iterdir())
    make("siglip", seed=9).save_pretrained(path, is_main_process=False)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in path.iterdir()) == before
    assert_close(features(load(path)), features(tower))


def test_saving_goes_where_it_is_told(tmp_path: Path, monkeypatch) -> None:
    tower = make("siglip")
    want = features(tower)
    monkeypatch.chdir(tmp_path)
    tower.save_pretrained("a/b")
    assert_close(features(load("a/b")), want)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    tower.save_pretrained("link")
    assert (tmp_path / "link").is_symlink()
    assert_close(features(load(tmp_path / "link")), want)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tower.save_pretrained(".")
    assert_close(features(load(tmp_path / "here")), want)
    (tmp_path / "file").write_text("")
    refused(
        lambda: tower.save_pretrained(tmp_path / "file"), "directory must not be a file", "file"
    )


def test_the_writing_version_of_transformers_is_recorded(saved) -> None:
    import transformers

    config = json.loads((saved[0] / "config.json").read_text())
    assert config["transformers_version"] == transformers.__version__
    assert config["mixpert_format"] == 1
    assert config["architectures"] == ["FusedMixpertTower"]


def test_a_tower_without_projector_round_trips(tmp_path: Path) -> None:
    tower = FusedMixpertTower.from_vision_model(KINDS["dinov2"].build(), num_experts=2)
    tower.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.projector is None
    assert loaded.config.hidden_size == WIDTH
    images = pixels(2, (28, 28))
    assert_close(run(loaded.eval(), images, [1, 0]), run(tower, images, [1, 0]))
