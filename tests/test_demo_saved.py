"""The demo on a model that has experts, names and a router of its own, and names of any length in its picture."""

from __future__ import annotations

import numpy as np
import pytest
from test_cli import fail

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

from matplotlib.figure import Figure  # noqa: E402
from test_cli_route import NAMES, build, llava  # noqa: E402

from mixpert_kernels.demo import figure, model, run  # noqa: E402
from mixpert_kernels.demo.images import Sample, evaluation_set, training_set  # noqa: E402
from mixpert_kernels.demo.results import Routed  # noqa: E402
from mixpert_kernels.hf.loading import load_tower  # noqa: E402

SMALL = model.Geometry(64, 128, 4, 4, 64, 16)


def named(names: list[str]) -> model.DemoModel:
    """A small tower whose router knows the demo's domains, under other names."""
    made = model.build_model("small", None, 4, 0)
    model.train_router(made, training_set(4, 0), 0)
    made.tower.config.expert_names = names
    return made


@pytest.fixture(scope="module")
def some() -> list[Sample]:
    """A third of the images to route."""
    return evaluation_set(0)[::3]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, some: list[Sample]) -> list[tuple]:
    """What the demo draws, in place of the picture; nothing else is trained or timed."""
    monkeypatch.setitem(model.GEOMETRIES, "small", SMALL)
    monkeypatch.setattr(run, "evaluation_set", lambda seed: some)
    seen: list[tuple] = []
    monkeypatch.setattr(run, "draw_figure", lambda *args: seen.append(args))
    monkeypatch.setattr(run, "train_router", lambda *_: pytest.fail("trained a saved router"))
    monkeypatch.setattr(run, "time_variants", lambda *_: pytest.fail("timed trained experts"))
    return seen


def test_a_saved_tower_is_shown_with_its_own_router_and_names(drawn, tmp_path, capsys):
    names = ["versatile", "photo", "chart", "document"]
    made = named(names)
    made.tower.save_pretrained(tmp_path / "tower")
    result = run.run_demo(run.DemoOptions(model=tmp_path / "tower", out=tmp_path / "a.png"))
    again = run.route_samples(made, result.samples)
    assert [r.expert for r in result.routed] == [r.expert for r in again]
    assert result.accuracy is not None and result.accuracy > 0.5 and result.timings == []
    text = capsys.readouterr().out
    assert "the model's own, as it is" in text
    assert "to versatile to photo to chart to document right" in " ".join(text.split())
    ((_, _, _, got, title, notes),) = drawn
    assert got == names and "of 10 images went to their domain's expert" in title
    assert "untrained" not in " ".join(notes)


def test_names_that_are_no_domains_make_no_verdict(drawn, tmp_path, capsys):
    made = named(["all", "chart", "b", "c"])  # the expert of photos is called chart
    made.tower.config.routing = "score_threshold"
    made.tower.save_pretrained(tmp_path / "tower")
    result = run.run_demo(run.DemoOptions(model=tmp_path / "tower", out=tmp_path / "a.png"))
    assert {r.wanted for r in result.routed} == {-1, 1}
    assert "of 3 images)" in capsys.readouterr().out  # the charts

    config = made.tower.config
    config.expert_names, config.routing = ["all", "a", "b", "c"], "direct"
    made.tower.save_pretrained(tmp_path / "tower")
    result = run.run_demo(run.DemoOptions(model=tmp_path / "tower", out=tmp_path / "a.png"))
    text = capsys.readouterr().out
    assert result.accuracy is None and "accuracy" not in text and "wrong" not in text
    assert text.split("\n\n")[1].split()[:6] == ["image", "expert", "all", "a", "b", "c"]
    first, second = (" ".join(args[-1]) for args in drawn)
    assert "below 0.5, all takes it" in first and "Red" in first
    assert "The best score decides." in second and "No expert is called photo, chart" in second


def test_a_tower_without_names_has_numbers(drawn, tmp_path, capsys):
    made = named(None)
    made.tower.save_pretrained(tmp_path / "tower")
    run.run_demo(run.DemoOptions(model=tmp_path / "tower", out=tmp_path / "a.png"))
    assert "expert 0  expert 1  expert 2  expert 3" in capsys.readouterr().out
    assert load_tower(tmp_path / "tower").config.expert_names is None


def test_a_vision_language_model_is_shown_by_its_vision_side(drawn, tmp_path, capsys):
    build("llava", 6, expert_names=NAMES).save_pretrained(tmp_path / "llava")
    llava().save_pretrained(tmp_path / "llava")
    options = run.DemoOptions(model=tmp_path / "llava", out=tmp_path / "a.png")
    result = run.run_demo(options)
    text = capsys.readouterr().out
    assert "llava, 3 experts over the last 2 layers and the projector" in text
    assert "to photo  to chart  to document" in text and result.accuracy is not None
    assert all(len(r.scores) == 3 for r in result.routed)
    assert [names for *_, names, _, _ in drawn] == [NAMES]

    (tmp_path / "llava" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"must hold preprocessor_config\.json"):
        run.run_demo(options)
    argv = ["demo", "--model", tmp_path / "llava", "--experts", 3]
    assert "must not be given for" in fail(capsys, *argv)[1]


@pytest.mark.parametrize(
    "names",
    [
        ["versatile", "photo", "chart", "document"],
        ["natural scenes", "scientific plots and charts", "handwritten and printed documents"],
        [f"images of kind {k}" for k in range(8)],
    ],
    ids=["short", "long", "many"],
)
@pytest.mark.parametrize("count", [1, 28])
def test_names_of_any_length_cover_nothing(names, count, tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(figure, "_write", lambda canvas, path: figures.append(canvas.figure))
    sample = Sample("motorcycle", "photo", Image.fromarray(np.zeros((60, 80, 3), np.uint8)))
    scores = tuple(np.full(len(names), 1 / len(names)))
    routed = [Routed(i % len(names), i % 2 - (i % 2 == 0), scores) for i in range(count)]
    notes = [
        "tower from runs/first; siglip_vision_model",
        "The model's own router; " + "word " * 12,
    ]
    title = f"Mixpert: {count} of {count} images went to their domain's expert (100.0%)"
    if count == 1:
        title = "Mixpert: 1 images, each routed to one expert"
    figure.draw_figure(tmp_path / "x.png", [sample] * count, routed, names, title, notes)
    (made,) = figures
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    texts = [text.get_window_extent() for text in made.texts]
    assert not legend.get_window_extent().count_overlaps(texts)
    assert legend.get_window_extent().x0 > 0
    boxes = [[t.get_window_extent() for t in (ax.title, *ax.texts)] for ax in made.axes]
    assert min(box.x0 for cell in boxes for box in cell if box.width) >= 0
    for left, right in zip(boxes, boxes[2:], strict=False):  # a picture, its bars, a picture, ...
        assert not any(box.count_overlaps(right) for box in left)
