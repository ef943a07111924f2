"""Names of experts in what a training run prints, writes and draws, and models that cannot be trained by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _mllms import KINDS
from _recipes import data, labelled_folder, picture, recipe, rows, stages, table
from matplotlib.figure import Figure
from test_cli import fail
from test_mllm_parity import mixed

from mixpert_kernels.hf.heads import Classifier
from mixpert_kernels.hf.loading import load_preprocessing, load_tower
from mixpert_kernels.training import Recipe, confusion, curve, train
from mixpert_kernels.training.data import read_images

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["anything", "photo", "chart"]
DOMAINS = NAMES[1:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images among the test's photographs that look like charts, or like neither."""
    root = data(tmp_path_factory.mktemp("names"))
    for i, shade in enumerate(["chart", "chart", "document", "document", "document"]):
        picture(shade, "red", seed=i).save(root / "test" / "photo" / "red" / f"{shade}{i}.png")
    train(recipe(root, data={"experts": NAMES}, stage=stages(steps=2)), progress=False)
    return root


def test_the_routes_are_those_of_the_saved_tower(root: Path):
    found = json.loads((root / "out" / "results.json").read_text())
    assert found["experts"] == NAMES and list(found["routes"]) == DOMAINS
    assert 0 < found["routes"]["photo"]["chart"] < 1
    model = Classifier.from_run(root / "out")
    assert model.tower.config.expert_names == NAMES
    images = read_images(root / "test", "label", NAMES)
    preprocess = load_preprocessing(None, model.tower.config.vision_config)
    for domain in DOMAINS:
        own = [i for i, s in enumerate(images.samples) if s.domain == domain]
        pixels = preprocess([images.open(i) for i in own])
        with torch.no_grad():
            expert = model.tower(pixels).expert
        shares = torch.bincount(expert, minlength=3) / len(own)
        row = found["routes"][domain]
        assert list(row) == NAMES and list(row.values()) == pytest.approx(shares.tolist())
        assert row[domain] == pytest.approx(found["domains"][domain]["routed_right"])
        assert row["anything"] == pytest.approx(found["domains"][domain]["fell_back"])


def test_metrics_are_called_by_the_names(root: Path):
    found = [row for row in rows(root / "out") if row["stage"] == "experts"]
    for key in ("loss_of", "share", "lr"):
        assert {name for row in found for name in row[key]} == set(DOMAINS)
    assert {name for row in found for name in row["norm"]} >= set(DOMAINS)


def test_a_run_without_a_router_has_no_routes(tmp_path: Path, capsys):
    made = table(data(tmp_path), stage=[{"name": "joint", "steps": 1, "batch": 4}])
    made.pop("calibrate")
    results = train(Recipe.from_dict(made), progress=False)
    assert "routes" not in results and not (tmp_path / "out" / "routing.png").exists()
    assert " to photo" not in capsys.readouterr().out


def test_the_table_and_the_picture(tmp_path: Path, capsys, monkeypatch):
    routes = {
        "photo": {"anything": 0.25, "photo": 0.75, "chart": 0.0},
        "chart": {"anything": 0.0, "photo": 0.4, "chart": 0.6},
    }
    confusion.print_routes(routes)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["domain", "to", "anything", "to", "photo", "to", "chart"],
        ["photo", "25.0%", "75.0%", "0.0%"],
        ["chart", "0.0%", "40.0%", "60.0%"],
    ]
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *args: drawn.append(f) or save(f, *args))
    confusion.draw_routes(tmp_path / "routing.png", routes)
    (ax,) = drawn[0].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert [label.get_text() for label in ax.get_yticklabels()] == DOMAINS
    assert [text.get_text() for text in ax.texts] == ["25%", "75%", "0%", "0%", "40%", "60%"]
    assert [t.get_text() for t in ax.texts if t.get_weight() == "bold"] == ["75%", "60%"]
    assert (tmp_path / "routing.png").stat().st_size > 5000


def test_the_curve_names_the_expert_that_takes_the_rest(root: Path, tmp_path: Path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda f, *args: drawn.append(f))
    tower = load_tower(root / "out" / "tower")
    features = torch.randn(6, tower.config.vision_config.hidden_size)
    result = tower.calibrate(features, torch.tensor([0, 1, 2] * 2))
    curve.draw_curve(tmp_path / "x.png", result, "delta", NAMES[0])
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert "fell back to anything" in labels


@pytest.mark.parametrize("names", [["a", " "], ["a", ""], ["a", "a"]])
def test_names_that_are_none_are_refused(names, tmp_path):
    with pytest.raises(ValueError, match=r"data\.experts must be different names, none of them"):
        recipe(tmp_path, data={"experts": names})


def test_models_that_have_experts_say_what_to_do(root: Path, tmp_path: Path, capsys):
    tower, plain, whole = root / "out" / "tower", tmp_path / "plain", tmp_path / "mixed"
    KINDS["llava"].build().save_pretrained(plain)
    mixed(KINDS["llava"]).save_pretrained(whole)
    for name in ("train", "test", "held_out"):
        labelled_folder(tmp_path / name)
    for directory, text in (
        (tower, "got the tower .*: give the checkpoint that it was made from"),
        (whole, r"got .*mixed, a vision-language model with experts: train .* \(docs/mllm\.md, "),
    ):
        model = {"vision": str(directory), "head": "classifier"}
        made = table(tmp_path) | {"model": model}
        with pytest.raises(ValueError, match=rf"model\.vision must be .* without experts, {text}"):
            train(Recipe.from_dict(made), progress=False)
    assert not (tmp_path / "out").exists()
    for argv, status, text in (
        (["--model", whole], 1, "a vision-language model with experts: train that in a loop of"),
        ([whole], 1, "a vision-language model with experts"),
        (["--model", tower], 1, "of which stage clone makes the experts"),
        ([plain], 1, "as vision = "),
        ([plain], 1, "for more than its vision tower and projector see docs/mllm.md"),
        (["--model", tmp_path / "none"], 1, "directory must exist"),
        ([tmp_path], 1, "must hold config.json"),
        ([], 2, "required: CONFIG.toml"),
    ):
        got, line = fail(capsys, "train", *argv)
        assert got == status and text in line, (argv, line)


def test_the_vision_side_of_a_plain_model_trains_as_a_tower(tmp_path: Path):
    KINDS["llava"].build().save_pretrained(tmp_path / "llava")
    model = {"vision": str(tmp_path / "llava"), "head": "classifier", "expert_layers": 1}
    made = table(data(tmp_path), stage=stages(steps=1)) | {"model": model}
    results = train(Recipe.from_dict(made), progress=False)
    assert list(results["routes"]) == DOMAINS
    tower = load_tower(tmp_path / "out" / "tower")
    assert tower.config.vision_config.model_type == "clip_vision_model"
    assert tower.config.projector is not None
