"""The demo: its images share nothing, it is repeatable, and it runs from end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

from mixpert_kernels.demo import charts, documents, figure, model, run  # noqa: E402
from mixpert_kernels.demo.images import (  # noqa: E402
    DOMAINS,
    Sample,
    evaluation_set,
    fingerprint,
    folder_set,
    training_set,
)
from mixpert_kernels.demo.results import Routed, accuracy, domain_table, mistakes  # noqa: E402
from mixpert_kernels.demo.timing import Timing, time_variants  # noqa: E402

SMALL = model.Geometry(64, 128, 4, 4, 64, 16)
NAMES = ["versatile", "photo", "chart", "document"]


@pytest.fixture(scope="module")
def evaluation() -> list[Sample]:
    return evaluation_set(0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.GEOMETRIES, "tiny", SMALL)


def hashes(samples: list[Sample]) -> list[str]:
    return [fingerprint(sample.image) for sample in samples]


def test_evaluation_set_has_enough_distinct_images_of_three_domains(evaluation):
    assert Counter(s.domain for s in evaluation) == {"photo": 8, "chart": 10, "document": 10}
    assert len({s.name for s in evaluation}) == len(set(hashes(evaluation))) == 28
    assert all(s.image.mode == "RGB" and min(s.image.size) >= 150 for s in evaluation)


def test_training_images_are_distinct_and_share_none_with_the_evaluation(evaluation):
    training = training_set(12, 0)
    assert Counter(s.domain for s in training) == dict.fromkeys(DOMAINS, 12)
    assert len(set(hashes(training + evaluation))) == 36 + 28


def styles_used(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], object]) -> list[tuple]:
    used: list[tuple] = []
    blank = Image.new("RGB", (8, 8))
    for module, name in ((charts, "draw_chart"), (documents, "draw_document")):
        monkeypatch.setattr(module, name, lambda kind, rng, style: used.append(style) or blank)
    draw()
    return used


def test_fonts_and_palettes_of_training_and_evaluation_differ(monkeypatch):
    train = styles_used(monkeypatch, lambda: training_set(24, 0))
    evaluate = styles_used(monkeypatch, lambda: evaluation_set(0))
    for kind in (charts.Style, documents.Face):
        for field in set(kind._fields) - {"paper"}:
            seen, held_out = (
                {getattr(style, field) for style in used if isinstance(style, kind)}
                for used in (train, evaluate)
            )
            assert seen and held_out and not seen & held_out, (kind, field)


def test_a_seed_gives_the_same_images_and_another_gives_others(evaluation):
    assert hashes(evaluation_set(0)) == hashes(evaluation)
    assert hashes(training_set(2, 3)) == hashes(training_set(2, 3))
    assert not set(hashes(training_set(2, 3))) & set(hashes(training_set(2, 4)))
    drawn = [s for s in evaluation_set(1) if s.domain == "chart"]
    assert not set(hashes(drawn)) & set(hashes(evaluation))


def test_a_training_image_among_those_to_route_is_refused(monkeypatch, tmp_path, small, evaluation):
    monkeypatch.setattr(run, "training_set", lambda count, seed: evaluation[:2])
    with pytest.raises(RuntimeError, match="must not be among the training images"):
        run.run_demo(run.DemoOptions(out=tmp_path / "a.png"))


def test_demo_end_to_end(tmp_path: Path, monkeypatch, capsys):
    """At the default geometry, with a third of the training images."""
    monkeypatch.setattr(run, "time_variants", lambda tower, pixels: [Timing("routed", 0.5)])
    out = tmp_path / "demo.png"
    result = run.run_demo(run.DemoOptions(out=out, images_per_domain=26))
    text = capsys.readouterr().out
    assert "RANDOM trunk weights" in text
    assert f"routing accuracy {result.accuracy:.1%}" in text
    assert text.count("wrong: ") == round((1 - result.accuracy) * 28)
    assert result.accuracy >= 0.6
    with Image.open(out) as picture:
        assert 900 < picture.width < 2400 and 700 < picture.height < 2000
        assert np.asarray(picture.convert("L")).std() > 20
    assert 100_000 < out.stat().st_size < 1_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]


def test_demo_is_repeatable_and_routes_a_users_folder(tmp_path: Path, small, capsys, evaluation):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for sample in evaluation[::9]:
        sample.image.save(folder / f"{sample.name}.png")
    options = run.DemoOptions(images=folder, out=tmp_path / "b.png", images_per_domain=3)
    first, second = run.run_demo(options), run.run_demo(options)
    assert first.routed == second.routed
    assert first.accuracy is None
    assert [s.name for s in first.samples] == sorted(s.name for s in evaluation[::9])
    text = capsys.readouterr().out
    assert "accuracy" not in text and "astronaut" in text
    assert "all experts run, one result kept" in text
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize("experts", [1, 2, 6])
def test_domains_without_an_expert_belong_to_the_versatile_one(experts):
    names = model.expert_names(experts)
    assert len(set(names)) == experts and names[0] == "versatile"
    assert [model.expert_of(d, names) for d in DOMAINS] == [
        k if k < experts else 0 for k in (1, 2, 3)
    ]


def test_results_count_a_fallback_as_wrong():
    image = Image.new("RGB", (8, 8))
    samples = [
        Sample("a", "photo", image),
        Sample("b", "photo", image),
        Sample("c", "chart", image),
    ]
    scores = (0.0, 0.5, 0.45, 0.05)
    routed = [Routed(1, 1, scores), Routed(0, 1, scores), Routed(3, 2, scores)]
    assert accuracy(routed) == pytest.approx(1 / 3)
    assert domain_table(samples, routed, NAMES)[1:] == [
        ["photo", "2", "1", "1", "0", "0", "50.0%"],
        ["chart", "1", "0", "0", "0", "1", "0.0%"],
        ["all", "3", "1", "1", "0", "1", "33.3%"],
    ]
    assert [line.partition(",")[0] for line in mistakes(samples, routed, NAMES)] == [
        "b: is photo",
        "c: is chart",
    ]
    assert "fallback" in mistakes(samples, routed, NAMES)[0]


def test_wrong_images_look_different_in_the_figure(tmp_path: Path):
    sample = Sample("a", "photo", Image.new("RGB", (80, 60), "white"))
    red = {}
    for name, result in {"right": 1, "wrong": 3}.items():
        path = tmp_path / f"{name}.png"
        routed = [Routed(result, 1, (0.0, 0.2, 0.1, 0.7))]
        figure.draw_figure(path, [sample], routed, NAMES, "title", ["note"])
        pixels = np.asarray(Image.open(path).convert("RGB"))
        red[name] = (pixels == (0xC0, 0x00, 0x20)).all(-1)
    assert not red["right"].any()
    column = red["wrong"].sum(0).max()  # the frame's left side: longer than any label is high
    assert column > 100


def test_timing_refuses_a_variant_that_computes_something_else(small):
    demo = model.build_model("tiny", None, 4, 0)
    pixels = torch.randn(4, 3, 64, 64)
    assert len(time_variants(demo.tower, pixels, repeats=1)) == 5
    with torch.no_grad():
        for parameter in demo.tower.projector.parameters():
            parameter[1:] *= 1.5
        demo.tower.config.delta = 0.0
        demo.tower.router.out.bias[2] = 5.0
    with pytest.raises(RuntimeError, match="must give what the routed tower gives"):
        time_variants(demo.tower, pixels, repeats=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "experts must lie in 1..8, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"out": Path("demo.jpg")}, "out must end in .png"),
        ({"out": Path("nowhere/demo.png")}, "out must be a file in a directory"),
        ({"images": Path("nowhere")}, "folder must be an existing directory"),
        ({"model": Path("nowhere")}, "directory must exist, got nowhere"),
    ],
)
def test_bad_options_are_named_before_any_work(change, message, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "training_set", lambda *_: pytest.fail("worked before checking"))
    options = run.DemoOptions(out=tmp_path / "x.png")._replace(**change)
    with pytest.raises(ValueError, match=message):
        run.run_demo(options)


def test_folders_must_hold_images(tmp_path: Path):
    with pytest.raises(ValueError, match="must hold image files"):
        folder_set(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png must be a readable image"):
        folder_set(tmp_path)
