"""The examples of docs/, run as a user runs them, and their pages, which show what they print."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")  # LLaVA-OneVision's processor of videos needs it
Image = pytest.importorskip("PIL.Image")

from mixpert_kernels.hf.mllm import unmixpertize  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
SCRIPT, PAGE = EXAMPLES / "llava_onevision.py", EXAMPLES / "llava_onevision.md"
OUT = "llava-onevision-mixpert"
DOMAINS = ["photo", "chart", "document"]
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="the repository is not around the tests"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ``--tiny`` prints, and the directory it writes."""
    where = tmp_path_factory.mktemp("example")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny"],
        cwd=where,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, where / OUT


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names of the example, run in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(SCRIPT), run_name="example")


def routes(printed: str) -> list[str]:
    return re.findall(r"^\w+ -> (\w+) \(", printed, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_images_of_one_batch_go_to_their_experts(tiny):
    printed, _ = tiny
    assert routes(printed) == DOMAINS
    (line,) = re.findall(r"right on others: (.*)", printed)
    shares = dict(re.findall(r"(\w+) (\d+ of \d+)", line))
    right, images = np.array([list(map(int, s.split(" of "))) for s in shares.values()]).T
    assert list(shares) == DOMAINS and images.tolist() == [8, 10, 10]
    assert right.sum() / images.sum() > 2 / 3  # one expert for all images is right on a third


def test_answers_are_the_same_alone_in_the_batch_and_after_loading(tiny):
    printed, _ = tiny
    assert "alone     3 of 3 answers and routes are the same" in printed
    assert "reloaded  3 of 3 answers and routes are the same" in printed
    answers = re.findall(r"\? '(.*)'$", printed, re.MULTILINE)
    assert len(set(answers)) == 3 and all(answers)


def test_what_it_writes_is_the_model_the_processor_and_the_picture(tiny):
    _, out = tiny
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.mixpert["expert_names"] == ["versatile", *DOMAINS]
    processor = AutoProcessor.from_pretrained(out)
    assert processor.chat_template and processor.tokenizer.padding_side == "left"
    picture = np.asarray(Image.open(out / "routes.png").convert("RGB"))
    below = picture[len(picture) // 3 :]
    frames = [(below == colour).all(-1) for colour in ((0, 114, 178), (230, 159, 0), (0, 158, 115))]
    places = [np.nonzero(frame.sum(0) > 100)[0] for frame in frames]  # columns with a frame's sides
    edges = [(min(x) / picture.shape[1], max(x) / picture.shape[1]) for x in places]
    (_, first), (second, third), (fourth, last) = edges
    assert first < second < third < fourth and last > 0.95  # side by side, over the whole width


def test_a_directory_and_a_folder_of_ones_own(example, tmp_path, monkeypatch, capsys):
    """Coloured squares; a red one is a photo, and so on. In the directory's own dtype, and in another."""
    for domain, colour in zip(DOMAINS, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True):
        (tmp_path / "data" / domain).mkdir(parents=True)
        for i in range(5):
            image = Image.new("RGB", (70 + 40 * i, 90), colour)
            image.save(tmp_path / "data" / domain / f"{i}.png")
    plain = runpy.run_path(str(EXAMPLES / "tiny_llava_onevision.py"))["write"](tmp_path / "plain")
    out = tmp_path / "out"
    for dtype in ("float32", "bfloat16"):
        options = ["--data", tmp_path / "data", "--out", out, "--dtype", dtype, "--device", "cpu"]
        example["main"]([*map(str, [plain, *options]), "--max-new-tokens", "2"])
        printed = capsys.readouterr().out
        assert "trained on 9 images" in printed and routes(printed) == DOMAINS
        assert "photo 2 of 2, chart 2 of 2, document 2 of 2" in printed
        model = AutoModelForImageTextToText.from_pretrained(out)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    model = unmixpertize(model.float(), "chart")  # the router's training moved nothing else
    before = AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.bfloat16).float()
    after = model.state_dict()
    assert after.keys() == before.state_dict().keys()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())


def test_what_the_example_refuses(example, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example["main"](["--tiny", "somewhere"])
    assert "--tiny must come without a directory" in capsys.readouterr().err
    for domain in DOMAINS:
        (tmp_path / domain).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / domain / "only.png")
    with pytest.raises(ValueError, match="photo must hold at least 2 images, got 1"):
        example["labelled_images"](tmp_path, 1)


def test_a_square_image_is_what_decides_the_route_of_the_whole_one(example, tmp_path):
    """So the router is trained on small images, which leave the fewest tiles, and used on large ones."""
    directory = runpy.run_path(str(EXAMPLES / "tiny_llava_onevision.py"))["write"](tmp_path)
    model, processor = example["load"](directory, "cpu", "auto")
    images = [sample.image for sample in example["images"].evaluation_set()]
    small = [image.resize((64, 64)) for image in images]
    tiles = [
        [inputs["pixel_values"] for inputs in example["encode"](model, processor, given)]
        for given in (small, images)
    ]
    assert {len(image) for batch in tiles[0] for image in batch} == {2}
    squares, wholes = (torch.cat([batch[:, 0] for batch in made]) for made in tiles)
    level = 1 / 255 / min(processor.image_processor.image_std)
    assert (squares - wholes).abs().max() < 1.01 * level  # one grey level: Pillow's rounding


def same_form(printed: str) -> str:
    """The output without what another version of torch, matplotlib or Pillow may change."""
    form: list[tuple[str, str | Callable]] = [
        (r"\b[01]\.\d\d\b", "0.00"),
        (r"\? '.*'", "? ''"),
        (r"(photo|chart|document) \d+ of", r"\1 0 of"),
    ]
    for pattern, replacement in form:
        printed = re.sub(pattern, replacement, printed)
    return printed


def test_the_page_shows_what_is_printed_and_the_code_that_runs(tiny):
    printed, _ = tiny
    (shown,) = blocks("text")
    renew = f"paste into {PAGE.name} what python docs/examples/{SCRIPT.name} --tiny prints"
    assert same_form(shown) == same_form(printed), renew
    code = SCRIPT.read_text()
    *steps, afterwards = blocks("python")
    assert len(steps) == 6
    for step in steps:
        assert step in code, f"{PAGE.name} shows code that {SCRIPT.name} does not have:\n{step}"
    compile(textwrap.dedent(afterwards), PAGE.name, "exec")
    assert (PAGE.parent / "llava_onevision.png").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/mllm.md"])
def test_the_page_is_linked(page):
    root = EXAMPLES.parent.parent
    links = re.findall(r"\(([^)#]*llava_onevision\.md)\)", (root / page).read_text())
    assert links and all(((root / page).parent / link).samefile(PAGE) for link in links)
