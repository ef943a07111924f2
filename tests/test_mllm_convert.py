"""``mixpert convert`` of a vision-language model on disk: it gets its experts and stays whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _mllms import KINDS
from safetensors.torch import load_file, save_file
from test_mllm_saving import load, same_state

from mixpert_kernels import cli
from mixpert_kernels.hf.loading import load_tower
from mixpert_kernels.hf.mllm import unmixpertize

TEMPLATE = "additional_chat_templates/tool_use.jinja"
FILES = ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    directory = tmp_path / "plain"
    model = KINDS["llava_next"].build().to(torch.bfloat16)
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(directory, max_shard_size="20KB")
    for name in FILES:
        (directory / name).write_text(json.dumps({"from": name}))
    (directory / TEMPLATE).parent.mkdir()
    (directory / TEMPLATE).write_text("{{ messages }}")
    return directory


def convert(*argv: object) -> int:
    return cli.main(["convert", *map(str, argv)])


def test_convert_the_whole_model(plain, tmp_path, capsys):
    out = tmp_path / "mixed"
    names = ["--expert-names", "versatile, photo,chart"]
    for _ in range(2):  # onto its own result too
        assert convert(plain, "--layers", 1, *names, "--out", out) == 0  # as many experts as names
    text = capsys.readouterr().out
    assert "3 experts of 1 vision layers and the projector of a llava_next" in text
    assert "names: versatile, photo, chart; versatile also takes" in text
    files = (*FILES, TEMPLATE)
    assert [(out / name).read_text() for name in files] == [(plain / n).read_text() for n in files]
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77
    model = load(out)
    assert model.config.mixpert["expert_names"] == ["versatile", "photo", "chart"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_state(unmixpertize(model, "chart"), load(plain))
    shards = [path.name for path in out.iterdir() if "safetensors" in path.name]
    assert shards == ["model.safetensors"]  # the plain model's are not copied


def test_convert_refuses_what_it_cannot(plain, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    other = tmp_path / "fuyu"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "fuyu"}')
    mixed, tower = tmp_path / "mixed", tmp_path / "tower"
    assert convert(plain, "--out", mixed) == convert(plain, "--tower", "--out", tower) == 0
    capsys.readouterr()
    for argv, match in (
        ([other, *out], "FAMILIES in mixpert_kernels/hf/mllm/families.py"),
        ([mixed, *out], "it is a mixpertized model already"),
        ([mixed, "--tower", *out], "it is a mixpertized model already"),
        ([tmp_path / "none", *out], "directory must exist"),
        ([plain, "--layers", 9, *out], "expert_layers must lie in 1..3"),
        ([plain, "--projector-dim", 8, *out], "must come with --tower"),
        ([plain, "--feature-layer", -2, *out], "must come with --tower"),
        ([plain, "--out", other], "must not hold another model"),
        ([plain, "--tower", "--out", mixed], "must not hold another model"),
        ([plain, "--out", tower], "must not hold another model"),
        ([plain, "--expert-names", "a,b,a", *out], "must be 3 different names"),
        ([plain, "--expert-names", "a,,b", *out], "none of them blank, got 'a,,b'"),
        ([plain, "--expert-names", "", *out], "none of them blank, got ''"),
        ([plain, "--experts", 4, "--expert-names", "a,b", *out], "must be 4 different names"),
    ):
        assert convert(*argv) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and match in error[0]
    assert not (tmp_path / "out").exists()


def test_the_tower_alone(plain, tmp_path, capsys):
    names = ["--expert-names", "photo,chart"]
    assert convert(plain, "--tower", *names, "--feature-layer", -2, "--out", tmp_path / "t") == 0
    assert "2 experts of the last 2 layers of a clip_vision_model" in capsys.readouterr().out
    tower = load_tower(tmp_path / "t")
    assert tower.config.expert_names == ["photo", "chart"]
    assert tower.projector is not None
    assert not (tmp_path / "t" / "tokenizer.json").exists()


def test_convert_refuses_a_checkpoint_that_lacks_a_parameter(plain, tmp_path, capsys):
    shard = next(path for path in plain.glob("model-*.safetensors"))
    state = load_file(shard)
    lost = next(iter(state))
    del state[lost]
    save_file(state, shard, {"format": "pt"})
    assert convert(plain, "--out", tmp_path / "out") == 1
    assert "parameters, got missing keys" in capsys.readouterr().err
