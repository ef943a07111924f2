"""Recipes: what a TOML file may say, and how a wrong one is refused."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
from _recipes import stages, table

from mixpert_kernels import cli
from mixpert_kernels.training import Recipe

DOCS = Path(__file__).parents[1] / "docs" / "training.md"


def wrong(root: Path) -> dict[str, tuple[dict, str]]:
    """Changes to a recipe, and what the message then says."""
    good = table(root)
    model, stage = good["model"], good["stage"]
    return {
        "unknown key": ({"sede": 1}, "sede must be a known key, perhaps seed, got sede"),
        "unknown stage key": ({"stage": [{"name": "joint", "step": 1}]}, "perhaps stage.steps"),
        "unknown data key": ({"data": {"trian": "x"}}, "perhaps data.train"),
        "unknown model key": ({"model": {**model, "experts": 2}}, "perhaps model.expert_layers"),
        "no steps": ({"stage": [{"name": "joint"}]}, "stage.steps must be given for joint"),
        "stage": ({"stage": [{"name": "jiont"}]}, "stage.name must be one of alignment"),
        "none": ({"stage": []}, "stage must be given at least once"),
        "order": ({"stage": stage[4:]}, "stage experts must come after clone"),
        "late": ({"stage": [stage[3], stage[2]]}, "stage joint must come before clone"),
        "twice": ({"stage": [stage[3]] * 2}, "clone once at most"),
        "clone": (
            {"stage": [{"name": "clone", "lr": 1.0}]},
            "stage.lr must not be given for clone",
        ),
        "router": (
            {"stage": [{**stage[5], "batch": 2}]},
            "stage.batch must not be given for router",
        ),
        "rate": ({"stage": stages(lr=-1.0)}, "stage.lr must be positive, got -1.0"),
        "nan": ({"stage": stages(lr=math.nan)}, "stage.lr must be positive"),
        "batch": ({"stage": stages(batch=0)}, "stage.batch must be at least 1, got 0"),
        "optimizer": ({"stage": stages(optimizer="adam")}, "stage.optimizer must be one of adamw"),
        "schedule": ({"stage": stages(schedule="x")}, "stage.schedule must be one of constant"),
        "type": ({"seed": "one"}, "seed must be a whole number, got 'one'"),
        "bool": ({"seed": True}, "seed must be a whole number, got True"),
        "list": ({"data": {"experts": "photo"}}, "data.experts must be a list, got 'photo'"),
        "table": ({"data": 3}, "data must be a table"),
        "precision": ({"precision": "fp16"}, "precision must be one of fp32, bf16"),
        "parallel": ({"parallel": "tp"}, "parallel must be one of ddp, fsdp"),
        "device": ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        "log": ({"log_every": 0}, "log_every must be at least 1"),
        "one expert": ({"data": {"experts": ["a"]}}, "at least two names"),
        "same experts": ({"data": {"experts": ["a", "a"]}}, "different names"),
        "bad image": ({"data": {"on_bad_image": "cry"}}, "on_bad_image must be one of skip, fail"),
        "two models": (
            {"model": {**model, "vision": "x"}},
            "either vision or siglip, got vision and",
        ),
        "two heads": ({"model": {**model, "language": "x"}}, "head or language, got head and"),
        "size": ({"model": {**model, "siglip": {**model["siglip"], "layers": 0}}}, "siglip.layers"),
        "errors": ({"calibrate": {"max_errors": 2.0}}, "calibrate.max_errors must lie in [0, 1]"),
        "no router": ({"stage": stage[:3]}, "calibrate must come with a router stage"),
        "direct": ({"model": {**model, "routing": "direct"}}, "have a threshold to calibrate"),
    }


@pytest.mark.parametrize("name", ["output", "data", "model", "stage", "data.train", "model.head"])
def test_a_missing_key_is_named(name: str, tmp_path: Path):
    made = table(tmp_path)
    place, _, key = name.rpartition(".")
    del (made[place] if place else made)[key]
    with pytest.raises(ValueError, match=f"train: {place or key}"):
        Recipe.from_dict(made)


@pytest.mark.parametrize("name", list(wrong(Path())))
def test_a_wrong_recipe_is_one_line_that_names_the_key(name: str, tmp_path: Path):
    changes, text = wrong(tmp_path)[name]
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(table(tmp_path, **changes))
    message = str(error.value)
    assert message.startswith("train: ") and text in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_command_line_are_one_line(tmp_path: Path, capsys):
    for name, text in (("none.toml", None), ("broken.toml", "a = = 1"), ("key.toml", "outptu = 1")):
        if text is not None:
            (tmp_path / name).write_text(text)
        assert cli.main(["train", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("mixpert train: train: ")
    assert "perhaps output" in captured.err


def test_python_without_tomllib_reads_toml_with_tomli(monkeypatch, tmp_path: Path):
    if sys.version_info >= (3, 11):
        tomllib = pytest.importorskip("tomllib")
        monkeypatch.setitem(sys.modules, "tomllib", None)
        monkeypatch.setitem(sys.modules, "tomli", tomllib)
    (tmp_path / "c.toml").write_text('output = "out"\nseed = "x"')
    with pytest.raises(ValueError, match=r"train: data must be given"):
        Recipe.load(tmp_path / "c.toml")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch):
    text = re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = Recipe.load("below/c.toml")
    assert found.output == tmp_path / "below" / "runs" / "first"
    assert found.data.train == tmp_path / "below" / "images" / "train"
