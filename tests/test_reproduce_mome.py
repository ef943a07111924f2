"""MoME's comparisons: what is asked and answered, what is trained, and that reports say what was measured."""

from __future__ import annotations

import copy
import itertools
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
from mixpert_kernels.reproduce import photos
from mixpert_kernels.reproduce import run as scheduler
from mixpert_kernels.reproduce.mome import (
    data,
    encoders,
    features,
    jobs,
    language,
    model,
    pages,
    report,
    results,
    run,
    scenes,
    sentences,
    tasks,
    training,
    verdicts,
)
from mixpert_kernels.reproduce.mome.settings import FULL, QUICK, Settings
from mixpert_kernels.reproduce.results import arrays_of
from mixpert_kernels.reproduce.settings import open_folder
from mixpert_kernels.reproduce.styles import SOURCES
from mixpert_kernels.reproduce.worker import write_json

pytestmark = pytest.mark.usefixtures("one_thread")  # as in a job's own process
ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(
    seeds=2,
    encoder=16,
    encoder_layers=1,
    llm=16,
    llm_layers=2,
    heads=2,
    adt_layers=1,
    adt_ffn=16,
    points=2,
    adapter=4,
    train=40,
    test=20,
    encoder_steps=(1, 1, 1),
    llm_steps=2,
    steps=2,
    more_steps=2,
    each=(2, 6, 6, 2),
)


def quiet(_count: int) -> None:
    """A progress nobody looks at."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny run with all jobs done, in this process."""
    folder = tmp_path_factory.mktemp("run")
    open_folder(folder, TINY)
    for job in jobs.plan(TINY):
        notes = jobs.run_job(job, TINY, folder, quiet)
        write_json(folder / f"{job.name}.json", notes | {"cpu seconds": 1.0})
    return folder


def test_a_scene_shows_what_is_said_of_it():
    """Each shape's colour is at its cell, and nowhere else on a background of none."""
    for index in range(30):
        rng = np.random.default_rng(index)
        things = scenes.choose_things(1 + index % 3, rng)
        drawn, cover = scenes.draw_scene(things, rng, "test")
        image = np.asarray(drawn).astype(int)
        assert len({(t.color, t.shape) for t in things}) == len(things)
        for thing in things:
            top, left = thing.row * scenes.CELL, thing.column * scenes.CELL
            cell = image[top : top + scenes.CELL, left : left + scenes.CELL].reshape(-1, 3)
            away = {color: np.abs(cell - tone).sum(1).min() for color, tone in scenes.TONES.items()}
            assert min(away, key=away.get) == thing.color, (index, thing, away)
        for number, thing in enumerate(things):
            rows, columns = np.nonzero(cover == 1 + number)
            assert abs(rows - thing.row).max() <= 1 and abs(columns - thing.column).max() <= 1
            assert cover[thing.row, thing.column] == 1 + number
            code = torch.tensor([data._code(thing)])
            what, row, column = (int(v) for v in data.decode(code))
            kind = (scenes.COLORS[what // 4], scenes.SHAPES[what % 4])
            assert (*kind, column, row) == thing


def test_a_page_says_its_word_where_its_targets_are():
    for index in range(40):
        kind, split = "page", ("train", "test")[index % 2]
        image, target = data.render(kind, split, 3, index)
        word = pages.WORDS[index % len(pages.WORDS)]
        assert "".join(data.facts(kind, split, 3, index).words) == word
        assert target.shape == (image.height // pages.PATCH, image.width // pages.PATCH)
        row = target[target.any(1).argmax()]
        read = [pages.LETTERS[n - 1] for n in row if n]
        runs = "".join(letter for letter, _ in itertools.groupby(read))
        once = "".join(letter for letter, _ in itertools.groupby(word))
        assert runs == once, (index, word, target)  # a letter may reach over two patches
        gray = np.asarray(image.convert("L")).astype(int)
        patches = gray.reshape(target.shape[0], pages.PATCH, target.shape[1], pages.PATCH)
        dark = np.ptp(patches, axis=(1, 3)) > 40
        assert (dark & (target > 0)).any(0)[(target > 0).any(0)].all(), (index, word)


def test_answers_follow_from_the_image():
    numbers = dict(enumerate(tasks.NUMBERS))
    for group, index in itertools.product(tasks.GROUPS, range(40)):
        kinds = tasks.ASKED[group]
        kind = kinds[index % len(kinds)]
        facts = data.facts(kind, "train", 0, index)
        question = data.question(group, kind, "train", 0, index)
        assert question == data.question(group, kind, "train", 0, index)
        words, answer = question.instruction.split(), question.answer.split()
        if group == "REC":
            (thing,) = [t for t in facts.things if {t.color, t.shape} <= set(words)]
            assert answer == [f"x{thing.column}", f"y{thing.row}"]
        elif group == "REG":
            (thing,) = [t for t in facts.things if {f"x{t.column}", f"y{t.row}"} <= set(words)]
            assert answer == [thing.color, thing.shape]
        elif kind == "scene":
            assert answer == [numbers[len(facts.things)]]
        else:
            assert answer == list(facts.words)
        ids, labels = tasks.encode(question)
        said = [tasks.VOCABULARY[i] for i in ids]
        assert said[: len(words) + 1] == [*words, tasks.ANSWER]
        assert [tasks.VOCABULARY[i] for i in labels if i >= 0] == [*answer, tasks.END]
        assert len(ids) == len(labels) == tasks.LENGTH


def test_splits_have_nothing_in_common(finished):
    parts = {split: TINY.split(split) for split in ("train", "test")}
    seen = {}
    for split, (part, seed) in itertools.product(parts, itertools.product(range(3), range(2))):
        for image in data.load(finished, parts[split][part], seed).square:
            assert seen.setdefault(image.tobytes(), (split, seed)) == (split, seed)
    assert len(seen) == 2 * sum(part.size for part in TINY.parts())


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_drawn_from_their_own_split(split, monkeypatch):
    fonts, crops = set(), set()
    pyramid, load = photos._pyramid, pages.font
    monkeypatch.setattr(photos, "_pyramid", lambda name: crops.add(name) or pyramid(name))
    monkeypatch.setattr(pages, "font", lambda *name: fonts.add(name) or load(*name))
    for kind, i in itertools.product(tasks.KINDS, range(80)):
        data.render(kind, split, 0, i)
    assert crops == set(SOURCES[split].photos)
    assert {name for name, size in fonts if size == pages.SIZE} == set(pages.FONTS[split])
    assert {name for name, size in fonts if size != pages.SIZE} == set(SOURCES[split].fonts)
    for one, other in itertools.combinations(pages.FONTS.values(), 2):
        assert set(one).isdisjoint(other)


def test_what_is_kept_is_what_is_drawn(finished):
    """Images, their pages' patches for Pix2Struct, and questions by the place of their image."""
    part = TINY.split("test")[2]
    images = data.load(finished, part, 1)
    image, target = data.render("page", "test", 1, 5)
    height, width = images.sizes[5]
    assert (height, width) == target.shape
    assert np.array_equal(images.native[5, : image.height, : image.width], np.asarray(image))
    assert np.array_equal(images.target[5, :height, :width], target)
    inputs = encoders.inputs_of("pix", images, np.array([4, 5]), TINY)
    own = inputs["flattened_patches"][1][inputs["attention_mask"][1].bool()]
    assert own.shape == (height * width, 2 + 3 * pages.PATCH**2)
    assert own[:, :2].tolist() == [[i + 1, j + 1] for i, j in np.ndindex(height, width)]
    pixels = (own[width + 2, 2:].view(pages.PATCH, pages.PATCH, 3) + 1) * 127.5  # row 1, column 2
    assert np.array_equal(pixels.round().numpy(), np.asarray(image)[8:16, 16:24])
    doc, rec = (data.questions(group, TINY.split("test"), 1) for group in ("Doc", "REC"))
    assert doc.image.tolist() == list(range(30, 50)) and rec.image.tolist() == list(range(20))


def test_sentences_are_the_same_on_any_machine():
    embedded = sentences.embed(["where is the red circle", "spell the word of the page"])
    assert embedded.shape == (2, 384) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    assert [round(float(v), 3) for v in sentences._word("where")[:3]] == [1.865, 3.011, 2.436]
    again = sentences.embed(["the red circle where is"])
    torch.testing.assert_close(again, embedded[:1])


def test_described_things_are_where_tokens_will_be():
    told, ids, labels = language.tell(8, np.random.default_rng(0), TINY)
    assert told.shape == (8, TINY.tokens, language.WORDS) and ids.shape == labels.shape
    words = [[tasks.VOCABULARY[i] for i in row if i] for row in told[3].tolist()]  # of Doc
    spelt = [row[0] for row in words if row != [tasks.BLANK]]
    answer = [tasks.VOCABULARY[i] for i in labels[3].tolist() if i >= 0]
    assert [*spelt, tasks.END] == answer and len(words) == TINY.tokens
    assert {len(row) for row in [[i for i in row if i] for row in told[1].tolist()]} == {1, 4}


def test_jobs_come_after_what_they_need():
    for settings in (FULL, QUICK, TINY):
        done: set[str] = set()
        for job in jobs.plan(settings):
            assert done.issuperset(job.after), job
            assert job.name not in done
            done.add(job.name)
            read = {f"{job.seed}-llm", *(f"{job.seed}-encoder-{n}" for n in encoders.ENCODERS)}
            read = {"first": read, "second": read | {f"{job.seed}-{model.BASE}"}}
            read["encoder"] = {f"{job.seed}-render"}
            assert read.get(job.method, set()) <= set(job.after), job
    arms = {job.detail for job in jobs.plan(FULL) if job.method in ("first", "second")}
    assert arms == {*model.FIRST, "one", "mole", "wide"} == set(report.TITLES)
    assert {arm for pair in results.PAIRS for arm in pair} <= arms
    assert FULL.seeds >= 3


def test_kept_features_are_what_the_encoders_see(finished):
    """A model says the same from pixels as from the features kept, up to their rounding to half precision."""
    arm = model.FIRST["adt+router"]
    made = jobs.load_model(arm, TINY, finished, 0)
    made.load_state_dict(torch.load(finished / "0-adt+router.pt"), strict=False)
    questions = data.questions("Doc", TINY.split("test"), 0).select(slice(6))
    stores = features.load(finished, 0, "test")
    kept = training.run(made, stores, questions).logits
    images = data.load(finished, TINY.split("test")[2], 0)
    inputs = {n: encoders.inputs_of(n, images, np.arange(6), TINY) for n in encoders.ENCODERS}
    seen = made(questions.ids, images=inputs, instructions=questions.instruction).logits
    scale = seen.abs().max()
    assert (kept - seen).abs().max() < 2e-2 * scale and not torch.equal(kept, seen)
    wrong = {name: store.select(questions.image - 1) for name, store in stores.items()}
    wrong = made(questions.ids, images=wrong, instructions=questions.instruction).logits
    assert (wrong - seen).abs().max() > 5e-2 * scale


def test_right_answers_are_those_that_are_generated(finished):
    """Teacher-forced, word by word, a question is right exactly where greedy generation says the answer."""
    made = jobs.load_model(model.second(TINY)["mole"], TINY, finished, 1)
    made.load_state_dict(torch.load(finished / "1-mole.pt"), strict=False)
    stores = features.load(finished, 1, "test")
    for group, want in (("Gen", 3), ("REG", 2)):
        questions = data.questions(group, TINY.split("test"), 1).select(slice(10))
        batch = questions._replace(ids=questions.ids.clone(), labels=questions.labels.clone())
        said = generated(made, stores, batch)
        for row in range(0, 10, want):  # some answers become what the model says
            asked = batch.labels[row] != -100
            batch.ids[row, asked] = batch.labels[row, asked] = said[row, : asked.sum()]
        right = training.answers(made, stores, batch)
        alike = [
            torch.equal(labels[labels != -100], row[: (labels != -100).sum()])
            for labels, row in zip(batch.labels, generated(made, stores, batch), strict=True)
        ]
        assert right.tolist() == alike and True in alike


def generated(made, stores, batch) -> torch.Tensor:
    """What a model says greedily to each question, (N, 6), each asked alone."""
    rows = []
    for i in range(len(batch.ids)):
        one = batch.select(slice(i, i + 1))
        prompt = one.ids[:, : int((one.ids == tasks.IDS[tasks.ANSWER])[0].int().argmax()) + 1]
        images = {name: stores[name].select(one.image) for name in made.branches}
        said = made.generate(
            prompt,
            images=images,
            instructions=one.instruction,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            suppress_tokens=None,
        )
        rows.append(said[0, -6:])
    return torch.stack(rows)


def test_stage_two_begins_where_stage_one_ended(finished):
    """One adapter, its copies and the wider one all say what the arm of stage 1 said, before they go on."""
    state = torch.load(jobs.state_path(finished, 0, model.BASE))
    stores = features.load(finished, 0, "test")
    questions = data.questions("REC", TINY.split("test"), 0)
    logits = {}
    for name, arm in {"base": model.FIRST[model.BASE], **model.second(TINY)}.items():
        made = jobs.load_model(arm, TINY, finished, 0)
        with torch.no_grad():
            before = training.run(made, stores, questions).logits
            model.grow(made, state)
            logits[name] = training.run(made, stores, questions).logits
        assert not torch.allclose(before, logits[name])
    for name in ("one", "mole", "wide"):
        torch.testing.assert_close(logits[name], logits["base"], rtol=1e-5, atol=1e-6)


def test_arms_see_the_same_questions_in_the_same_order():
    groups = [data.questions(group, TINY.split("train"), 0) for group in tasks.GROUPS]
    first, again = (list(training.batches(groups, (4, 4, 4, 4), 6, seed=1)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.ids, other.ids) and len(one.ids) == 16
    epoch = torch.cat(
        [batch.image[4:8] for batch in list(training.batches(groups, (4, 4, 4, 4), 10, 2))]
    )
    assert sorted(epoch.tolist()) == list(range(40))  # of REC: every scene once


def test_a_finished_run_is_reported_without_running_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(scheduler.subprocess, "Popen", lambda *_, **__: pytest.fail("ran again"))
    path = run.reproduce(finished, TINY, docs=finished / "docs")
    printed, found = capsys.readouterr().out, json.loads((finished / "results.json").read_text())
    text = path.read_text()
    mole = found["accuracy"]["mole"]["overall"]
    assert f"{mole['mean']:.2f} ± {mole['std']:.2f}" in text and "Adapters by group" in printed
    assert "fewer than three seeds" in text
    rights = [arrays_of(finished, f"{s}-mole")["right Doc"].mean() for s in range(2)]
    assert found["accuracy"]["mole"]["Doc"]["mean"] == pytest.approx(
        100 * np.mean(rights), abs=1e-3
    )
    for layer in itertools.chain(*found["adapters"]):
        assert all(
            sum(shares) == pytest.approx(100, abs=0.1) for shares in layer["shares"].values()
        )
    for name in report.PLOTS.values():
        with Image.open(finished / name) as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 10, name
    page = (finished / "docs" / "reproduce_mome.md").read_text()
    for link in re.findall(r"\]\((.*?\.png)\)", page):
        assert (finished / "docs" / link).is_file(), link
    flips(found)


def flips(found: dict) -> None:
    """Verdicts are read off the numbers: another number, another word."""
    pair = ("adt+router", "adt+addition")
    said = {}
    for mean in (5.0, -5.0, 0.5):
        other = copy.deepcopy(found)
        entry = verdicts.difference(other, *pair)["overall"]
        entry |= {"mean": mean, "error": 1.0, "seeds": [mean, mean]}
        lines = verdicts.sentences(other)
        (said[mean],) = [line for line in lines if line.startswith("**Weights chosen")]
        assert sum(a != b for a, b in zip(lines, verdicts.sentences(found), strict=True)) <= 1
    assert "Agrees" in said[5.0] and "Contradicts" in said[-5.0] and "Undecided" in said[0.5]
    assert "62.88 to 69.39" in said[5.0]
    other = copy.deepcopy(found)
    entry = verdicts.difference(other, "mole", "wide")["overall"]
    entry |= {"mean": -9.0, "error": 1.0, "seeds": [-9.0, -9.0]}
    assert "experts are worse than it" in verdicts.sentences(other)[5]


def test_information_by_hand():
    assert results.information(np.eye(4)) == pytest.approx(2)
    assert results.information(np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]])) == 0
    half = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert results.information(half) == pytest.approx(1)


def test_a_job_runs_in_a_process_of_its_own(finished):
    """And to the same numbers: an interrupted run goes on."""
    note = finished / "0-pool+addition.json"
    before = arrays_of(finished, "0-pool+addition")
    note.unlink()
    scheduler.run_all(finished, TINY, processes=1, study=jobs)
    after = arrays_of(finished, "0-pool+addition")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads(note.read_text())["parameters"]["adapters"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mome", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["mome", "--pilot"], "pilot must go with mixpert, got it with mome"),
        (["mome", "--write-data", "NEW"], "write-data must go with mixpert, got it with mome"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_was_measured():
    """docs/reproduce_mome.md is what the program writes from its results.json, to the letter."""
    page = ROOT / "docs" / "reproduce_mome.md"
    measured = ROOT / "docs" / "reproduce_mome" / "results.json"
    if not page.is_file():
        pytest.skip("the repository is not around the tests: no docs/reproduce_mome.md")
    assert report.text(json.loads(measured.read_text()), "reproduce_mome") == page.read_text()
