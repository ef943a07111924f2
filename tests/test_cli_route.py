"""``mixpert route`` with a vision-language model: what its processor and its vision side make of image files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _mllms import KINDS, SIZE
from PIL import Image
from test_cli import fail, run
from test_mllm_parity import mixed
from test_mllm_processors import (
    SQUARE,
    idefics3,
    internvl,
    llava_next,
    llava_onevision,
    smolvlm,
    tokenizer,
)
from torch import nn
from transformers.models.smolvlm import processing_smolvlm

from mixpert_kernels import cli
from mixpert_kernels.hf.mllm import record_routing
from mixpert_kernels.hf.mllm.vision_side import ImageReader, load_vision_side, route_image

NAMES = ["photo", "chart", "document"]
SHAPES = {"wide.png": (SIZE, 2 * SIZE), "tall.png": (2 * SIZE, SIZE), "small.png": (SIZE, SIZE)}


def llava() -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer(["<image>"]), 4, **options)


def write_images(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name, (height, width) in SHAPES.items():
        coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        paths.append(folder / name)
        picture.save(paths[-1])
    return paths


def build(family: str, image_token: int, **options: Any) -> nn.Module:
    """A mixpertized model whose scores differ from image to image."""
    kind = KINDS[family]
    model = mixed(kind, model=kind.build(image_token_id=image_token), distinct=True, **options)
    with torch.no_grad():
        model.model.mixpert_router.out.weight.mul_(0.3)
        model.model.mixpert_router.out.bias.zero_()
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("llava", 6, expert_names=NAMES)
    model.save_pretrained(tmp_path / "llava")
    llava().save_pretrained(tmp_path / "llava")
    write_images(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "make",
    [llava, llava_next, llava_onevision, internvl, idefics3, smolvlm],
    ids=lambda m: m.__name__,
)
def test_the_routes_are_those_of_a_prompt_with_the_image(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str, raising=False)
    processor = make()
    if (
        make is internvl
    ):  # its processor asks for crops, whatever its image processor would do alone
        processor.image_processor.crop_to_patches = False
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = build(make.__name__, image_token, expert_names=NAMES)
    directory, paths = tmp_path / "model", write_images(tmp_path)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    text = run(capsys, "route", "--model", directory, "--json", *paths)
    report = json.loads(text)
    assert report["experts"] == NAMES and report["checkpoint"] == str(directory)
    assert [row["image"] for row in report["images"]] == [str(path) for path in paths]
    found, counts = [], []
    side, read = load_vision_side(directory), ImageReader(directory)
    for row, path in zip(report["images"], paths, strict=True):
        inputs = processor(text="look <image>", images=Image.open(path), return_tensors="pt")
        with torch.no_grad(), record_routing(model) as records:
            model(**inputs)
        (record,) = records
        assert (row["expert"], row["name"]) == (int(record.expert), NAMES[int(record.expert)])
        assert list(row["scores"]) == NAMES
        got = torch.tensor(list(row["scores"].values()))
        torch.testing.assert_close(got, record.scores[0])
        found.append(got)
        tiles = route_image(side, read(Image.open(path))).routing.expert
        assert torch.equal(tiles, record.routing.expert)  # as many, and all to one expert
        counts.append(len(tiles))
    assert (max(counts) > 1) == (make is not llava)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("family", KINDS)
def test_the_vision_side_of_every_family(family, tmp_path):
    kind = KINDS[family]
    model = mixed(kind, distinct=True)
    model.save_pretrained(tmp_path)
    inputs = kind.call([[kind.many]])
    with torch.no_grad(), record_routing(model) as (records):
        model(**inputs)
    record = route_image(load_vision_side(tmp_path), inputs)
    assert torch.equal(record.routing.expert, records[0].routing.expert)
    torch.testing.assert_close(record.scores, records[0].scores)


def test_the_language_model_is_not_read(saved):
    from safetensors.torch import load_file, save_file

    path = saved / "llava" / "model.safetensors"
    before = load_vision_side(saved / "llava")
    state = {k: v for k, v in load_file(path).items() if "language_model" not in k}
    state = {k: v for k, v in state.items() if not k.startswith("lm_head")}
    assert len(state) < len(load_file(path))
    save_file(state, path, {"format": "pt"})
    after = load_vision_side(saved / "llava")
    assert list(before.state_dict()) == list(after.state_dict())
    assert not any("lm_head" in k or "language_model" in k for k in after.state_dict())
    inputs = ImageReader(saved / "llava")(Image.open(saved / "wide.png"))
    assert torch.equal(route_image(before, inputs).scores, route_image(after, inputs).scores)


def test_both_ways_to_name_the_model_and_a_folder(saved, capsys):
    model, wide = saved / "llava", saved / "wide.png"
    table = run(capsys, "route", "--model", model, wide, saved / "tall.png")
    assert table == run(capsys, "route", model, wide, saved / "tall.png")
    assert table == run(capsys, "route", model / "config.json", wide, saved / "tall.png")
    header, first, _ = table.splitlines()
    assert header.split() == ["image", "expert", *NAMES] and first.split()[0] == str(wide)
    assert first.split()[1] in NAMES
    assert len(run(capsys, "route", "--model", model, saved).splitlines()) == 1 + len(SHAPES)


def test_experts_without_names_have_numbers(tmp_path, capsys):
    build("llava", 6).save_pretrained(tmp_path / "llava")
    llava().save_pretrained(tmp_path / "llava")
    (path, *_) = write_images(tmp_path)
    report = json.loads(run(capsys, "route", "--model", tmp_path / "llava", path, "--json"))
    assert report["experts"] == ["expert 0", "expert 1", "expert 2"]
    assert report["images"][0]["name"] == f"expert {report['images'][0]['expert']}"


def test_bad_input_is_one_line(saved, capsys):
    model, wide = saved / "llava", saved / "wide.png"
    KINDS["llava"].build().save_pretrained(saved / "plain")
    (saved / "notes.png").write_text("no picture")
    bare = shutil.copytree(model, saved / "bare")
    (bare / "processor_config.json").unlink()
    blind = shutil.copytree(model, saved / "blind")
    (blind / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    wrong = shutil.copytree(model, saved / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    config["mixpert"] |= {"num_experts": 2, "expert_names": None}
    (wrong / "config.json").write_text(json.dumps(config))
    twice = shutil.copytree(model, saved / "twice")
    config["mixpert"] |= {"num_experts": 3, "expert_names": ["a", "a", "b"]}
    (twice / "config.json").write_text(json.dumps(config))
    for argv, status, text in (
        (
            ["--model", saved / "plain", wide],
            1,
            "a plain llava; `mixpert convert` gives it experts",
        ),
        (["--model", model, saved / "notes.png"], 1, "notes.png must be a readable image"),
        (["--model", model, saved / "none.png"], 1, "image must be an existing file"),
        (["--model", bare, wide], 1, "must hold preprocessor_config.json or processor_config.json"),
        (["--model", blind, wide], 1, "must be a checkpoint with a usable image processor"),
        (["--model", wrong, wide], 1, "as many experts as the weights"),
        (["--model", twice, wide], 1, "expert_names must be 3 different names"),
        (["--model", saved / "none", wide], 1, "directory must exist"),
        (["--model", model], 2, "required: IMAGES"),
    ):
        got, line = fail(capsys, "route", *argv)
        assert got == status and text in line, (argv, line)
    argv = ["calibrate", model, saved]
    assert "a mixpertized llava, which has its experts in place" in fail(capsys, *argv)[1]
    assert cli.main(["route", str(model), str(wide)]) == 0
