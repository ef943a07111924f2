"""The comparisons: what the loops train, what is kept of a run, and that reports say what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the extra 'reproduce' is not installed: no matplotlib")
pytest.importorskip("skimage", reason="the extra 'reproduce' is not installed: no scikit-image")
pytest.importorskip("sklearn", reason="the extra 'reproduce' is not installed: no scikit-learn")

from mixpert_kernels.cli import main
from mixpert_kernels.reproduce import data, jobs, report, rules, run
from mixpert_kernels.reproduce import results as numbers
from mixpert_kernels.reproduce import statistics as tallies
from mixpert_kernels.reproduce.data import DOMAINS, EXPERTS, MAKERS, Images
from mixpert_kernels.reproduce.model import new_model, predict, recut, trunk_features
from mixpert_kernels.reproduce.routes import RULES, train_router
from mixpert_kernels.reproduce.settings import FULL, QUICK, Settings, open_folder, read_settings
from mixpert_kernels.reproduce.training import batches, train_experts, warm_cosine
from mixpert_kernels.reproduce.verdicts import sentences, sign
from mixpert_kernels.reproduce.worker import write_json

pytestmark = pytest.mark.usefixtures("one_thread")  # as in a job's own process
ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(
    seeds=2,
    hidden=16,
    intermediate=16,
    projector=16,
    train=60,
    held_out=40,
    test=60,
    joint_steps=2,
    extra_steps=2,
    batch=20,
    routed=40,
    depths=(0, 2),
    rounds=1,
)


def quiet(_images: int) -> None:
    """A progress nobody looks at."""


def run_here(folder: Path, settings: Settings) -> None:
    """Run all jobs in this process."""
    open_folder(folder, settings)
    for job in jobs.plan(settings):
        notes = jobs.run_job(job, settings, folder, quiet)
        write_json(folder / f"{job.name}.json", notes | {"cpu seconds": 1.0})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny run with all jobs done."""
    folder = tmp_path_factory.mktemp("run")
    run_here(folder, TINY)
    return folder


def test_answers_are_balanced_and_of_the_domain(finished):
    for kind, (_, domain) in MAKERS.items():
        images = data.load(finished, TINY.part(kind, "test"), 0)
        first = 10 * DOMAINS.index(domain)
        counts = torch.bincount(images.labels, minlength=30)
        assert counts[first : first + 10].tolist() == [len(images.labels) // 10] * 10
        assert set(images.domain.tolist()) == {EXPERTS.index(domain)}
        assert data.LABELS[int(images.labels[3])].startswith(f"{domain}: ")
        assert np.array_equal(images.labels.numpy(), tallies.labels_of(kind, len(images.labels)))


def test_rendered_images_are_those_that_render_gives(finished):
    images = data.load(finished, TINY.part("noisy scan", "held_out"), 1)
    assert np.array_equal(
        images.pixels[7].permute(1, 2, 0).numpy(), data.render("noisy scan", "held_out", 1, 7)
    )


def some_images(count: int = 60) -> list[Images]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, 32, 32)
    return [
        Images(
            torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
            torch.arange(count) % 10 + 10 * i,
            torch.full((count,), i + 1),
        )
        for i in range(len(DOMAINS))
    ]


def test_a_domain_sees_the_same_images_whatever_the_others_are():
    domains = some_images()
    mixed = list(batches(domains, 20, 5, seed=3))
    alone = list(batches(domains[1:2], 20, 5, seed=3))
    for both, one in zip(mixed, alone, strict=True):
        assert both.domain.tolist() == [1] * 20 + [2] * 20 + [3] * 20
        assert torch.equal(both.pixels[20:40], one.pixels)
        assert torch.equal(both.labels[20:40], one.labels)
    epoch = torch.cat([batch.pixels for batch in alone[:3]])
    assert len(epoch.unique(dim=0)) == 60  # every image once


def test_the_schedule_warms_up_and_ends_at_zero():
    factor = warm_cosine(100)
    assert factor(0) == pytest.approx(0.2, rel=1e-3) and factor(4) > 0.99
    assert factor(50) == pytest.approx(0.5) and factor(99) < 1e-3


def test_experts_train_apart_and_the_rest_stays():
    start = new_model(TINY, 0)
    mixed, alone = recut(start, 2), recut(start, 2)
    domains = some_images()
    options = {"steps": 3, "rate": 1e-2, "seed": 0, "progress": quiet}
    train_experts(mixed, domains, TINY, **options)
    train_experts(alone, domains[1:2], TINY, **options)
    before = dict(recut(start, 2).state_dict())
    for name, value in mixed.state_dict().items():
        if name.startswith("tower.router"):
            continue
        if not name.startswith(("tower.experts", "tower.projector")):
            assert torch.equal(value, before[name]), name
            continue
        assert torch.equal(value[0], before[name][0]), name
        assert torch.equal(alone.state_dict()[name][1], before[name][0]), name
        if "k_proj.bias" in name:  # changes no attention: its gradient is rounding alone
            continue
        # the same images give the same expert; products of another batch may round otherwise
        torch.testing.assert_close(value[2], alone.state_dict()[name][2], rtol=0, atol=2e-4)
        assert not torch.equal(value[3], before[name][0]), name


@pytest.mark.parametrize("cloned", [0, 1, 2, 3])
def test_cutting_elsewhere_changes_nothing(cloned):
    model = new_model(TINY, 1).eval()
    other = recut(model, cloned).eval()
    pixels = data.as_input(some_images(8)[0].pixels)
    labels = torch.zeros(8, dtype=torch.int64)
    with torch.no_grad():
        want, got = (m(pixels, labels, labels).losses for m in (model, other))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_decisions_kept_are_those_of_the_tower(finished):
    """Task accuracy of a rule is that of the tower itself, from pixels, as it routes."""
    model = jobs.load_experts(TINY, finished, 1)
    train_router(
        model.tower, [jobs._load(TINY, finished, 1, d, "train").select(slice(40)) for d in DOMAINS]
    )
    arrays = numbers.experts_of(finished, TINY, 1)
    thresholds = json.loads((finished / "1-router.json").read_text())["thresholds"]
    assert set(thresholds) == {rule.title for rule in RULES[1:]}
    images = data.load(finished, TINY.part("chart", "test"), 1)
    for rule in RULES:
        config = model.tower.config
        config.routing, config.against = rule.routing, rule.against
        config.tau = config.delta = thresholds.get(rule.title, 0.5)
        with torch.no_grad():
            out = model(data.as_input(images.pixels), images.labels)
        assert out.expert.tolist() == arrays[f"{rule.title} chart"].tolist(), rule
        assert out.correct.tolist() == rules._right(arrays, "chart", out.expert.numpy()).tolist()


def test_predictions_kept_are_those_of_each_expert(finished):
    model = jobs.load_joint(TINY, finished, 0)
    images = data.load(finished, TINY.part("photo", "test"), 0)
    want = predict(model, trunk_features(model.tower, images.pixels))
    kept = numbers.arrays_of(finished, "0-joint")["predicted photo"]
    assert want.tolist() == kept.tolist()
    of_experts = numbers.arrays_of(finished, "0-experts-2")["predicted photo"]
    assert of_experts.shape == (4, 60)
    assert of_experts[0].tolist() == want.tolist()  # the versatile one is the joint model


def test_paired_differences_by_hand():
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    b = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], bool)
    found = tallies.paired(a, b)
    assert found["seeds"] == [25.0, 0.0] and found["mean"] == 12.5
    # differences 0, 1, 0, 0 and 0, 1, 0, -1: variances 1/4 and 2/3 (times 100^2), of the mean over 4 images and 2 seeds
    assert found["error"] == pytest.approx(100 * ((1 / 4 + 2 / 3) / 4) ** 0.5 / 2, abs=1e-3)
    assert found["std"] == pytest.approx(12.5 * 2**0.5, abs=1e-3)


@pytest.mark.parametrize(
    "mean, error, seeds, want",
    [(1.0, 0.4, [1, 1], 1), (-1.0, 0.4, [-1, -1], -1), (1.0, 0.6, [1, 1], 0), (1, 0.1, [3, -1], 0)],
)
def test_a_difference_counts_where_error_and_seeds_say_so(mean, error, seeds, want):
    assert sign({"mean": mean, "error": error, "seeds": seeds}) == want


def test_a_finished_run_is_reported_without_running_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(run.subprocess, "Popen", lambda *_, **__: pytest.fail("ran a job again"))
    path = run.reproduce(finished, TINY, docs=finished / "docs")
    printed, found = capsys.readouterr().out, json.loads((finished / "results.json").read_text())
    text = path.read_text()
    joint = found["accuracy"]["joint"]["overall"]
    assert f"{joint['mean']:.2f} ± {joint['std']:.2f}" in text and "cloned layers" in printed
    assert len(sentences(found)) == 9
    for name in report.PLOTS.values():
        with Image.open(finished / name) as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 10, name
    page = (finished / "docs" / "reproduce.md").read_text()
    for link in re.findall(r"\]\((.*?\.png)\)", page):
        assert (finished / "docs" / link).is_file(), link


def test_an_interrupted_run_goes_on(finished):
    """In a process of its own, and to the same numbers; a job that fails is named with its log."""
    note = finished / "0-separate-chart.json"
    notes, before = note.read_text(), numbers.arrays_of(finished, "0-separate-chart")
    note.unlink()
    run.run_all(finished, TINY, processes=1)
    after = numbers.arrays_of(finished, "0-separate-chart")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    state = finished / "0-joint.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:100])
    note.unlink()
    with pytest.raises(
        RuntimeError, match=r"job 0-separate-chart must finish, got .* \(see .*log\)"
    ):
        run.run_all(finished, TINY, processes=1)
    state.write_bytes(whole)
    note.write_text(notes)


def test_jobs_come_after_what_they_need():
    for settings in (FULL, QUICK, TINY, dataclasses.replace(TINY, widths=(16, 8))):
        done: set[str] = set()
        for job in jobs.plan(settings):
            assert done.issuperset(job.after), job
            assert job.name not in done
            done.add(job.name)
    assert FULL.seeds >= 3 and FULL.part("chart", "test").size >= 4000


def test_a_folder_keeps_one_run(tmp_path):
    open_folder(tmp_path, TINY)
    assert read_settings(tmp_path) == TINY
    open_folder(tmp_path, TINY)
    with pytest.raises(ValueError, match="must be empty or hold a run with the same settings"):
        open_folder(tmp_path, dataclasses.replace(TINY, batch=3))
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="must hold the settings of a run"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--out", "FILE"], "out must be a directory, got the file"),
        (["--write-data", "FILE"], "write-data must be a directory, got the file"),
        (["--write-data", "NEW", "--images", "0"], "images must be at least 1, got 0"),
        (["--processes", "0"], "processes must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["reproduce", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE"]


def test_the_page_says_what_was_measured():
    """docs/reproduce.md is what the program writes from docs/reproduce/results.json, to the letter."""
    page, measured = ROOT / "docs" / "reproduce.md", ROOT / "docs" / "reproduce" / "results.json"
    if not page.is_file():
        pytest.skip("the repository is not around the tests: no docs/reproduce.md")
    assert report.text(json.loads(measured.read_text()), "reproduce") == page.read_text()
