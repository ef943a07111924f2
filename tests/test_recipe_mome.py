"""Recipes of MoME: their defaults, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from _mome_recipes import mome_table

from mixpert_kernels.training import Recipe

STEPS = {"steps": 4, "warmup": 0}
MOVE, CLONE, MOLE = {"name": "move", **STEPS}, {"name": "clone"}, {"name": "mole", **STEPS}


def test_defaults_are_the_papers(tmp_path: Path):
    made = Recipe.from_dict(mome_table(tmp_path, stage=[{"name": "move"}, CLONE, {"name": "mole"}]))
    for stage in (made.stages[0], made.stages[2]):
        assert (stage.steps, stage.batch, stage.lr) == (30_000, 64, 5e-4)
        assert (stage.weight_decay, stage.warmup, stage.schedule) == (0.05, 1000, "cosine")
        assert (stage.optimizer, stage.max_norm) == ("adamw", 0.0)
        assert [stage.factor(step) for step in (0, 999, 1000, 15_500)] == pytest.approx(
            [1e-3, 1.0, 1.0, 0.5]
        )
    assert made.stages[1].steps is None and made.data.experts is None


def test_branches_are_given_what_is_theirs(tmp_path: Path):
    made = mome_table(tmp_path)
    made["model"]["mome"]["branches"] = {"dino": {"transform": "pool", "norm": True}}
    found = Recipe.from_dict(made, tmp_path).model.mome
    assert found.encoders["pix"] == tmp_path / "pix" and found.options.given["layers"] == 1
    assert found.branches["dino"].given == {"transform": "pool", "norm": True}


@pytest.mark.parametrize(
    "place, change, text",
    [
        ("mome", {"experts": 1}, "model.mome.experts must be at least 2, got 1"),
        ("mome", {"hidden": 0}, "model.mome.hidden must be at least 1"),
        ("mome", {"mix": "sum"}, "model.mome.mix must be one of router, addition"),
        ("mome", {"encoders": {}}, "model.mome.encoders must name at least one"),
        ("mome", {"encoders": "clip"}, "model.mome.encoders must be a table, got 'clip'"),
        ("mome", {"encoders": {"a": 1}}, "model.mome.encoders.a must be a path, got 1"),
        ("mome", {"branches": {"eva": {}}}, "branches must be one of clip, dino, pix, got eva"),
        ("mome", {"options": {"transform": "max"}}, "transform must be one of deformable"),
        ("mome", {"options": {"norm": 1}}, "model.mome.options.norm must be a boolean, got 1"),
        ("mome", {"expert": 2}, "perhaps model.mome.experts"),
        ("model", {"head": "classifier"}, "model.head must not be given for model.mome"),
        ("model", {"projector": 8}, "model.projector must not be given for model.mome"),
        ("model", {"language": None}, "model.language must be given for model.mome, got none"),
        ("data", {"experts": ["a", "b"]}, "data.experts must not be given for model.mome"),
        ("", {"parallel": "fsdp"}, "parallel must be ddp for model.mome, got fsdp"),
        ("", {"stage": [MOVE, MOLE]}, "stage mole must come after clone"),
        ("", {"stage": [CLONE, MOVE]}, "stage move must come before clone"),
        ("", {"stage": [{"name": "joint", "steps": 1}]}, "must be one of move, clone, mole, got"),
        ("", {"stage": [{"name": "move", "steps": 9}]}, "be less than the 9 steps, got 1000"),
        ("", {"calibrate": {}}, "calibrate must come with a router stage"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(place, change, text, tmp_path: Path):
    made = mome_table(tmp_path)
    at = {"": made, "model": made["model"], "mome": made["model"]["mome"], "data": made["data"]}
    at[place].update(change)
    if change == {"language": None}:
        del made["model"]["language"]
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(made)
    message = str(error.value)
    assert message.startswith("train: ") and text in message and "\n" not in message


def test_missing_keys_are_named(tmp_path: Path):
    for key in ("sentence", "encoders"):
        made = mome_table(tmp_path)
        del made["model"]["mome"][key]
        with pytest.raises(ValueError, match=f"model.mome.{key} must be given, got none"):
            Recipe.from_dict(made)


def test_a_tower_takes_no_stage_of_mome(tmp_path: Path):
    from _recipes import table

    made = table(tmp_path, stage=[MOVE])
    del made["calibrate"]
    with pytest.raises(ValueError, match=r"must be one of alignment, .* router, got move"):
        Recipe.from_dict(made)
