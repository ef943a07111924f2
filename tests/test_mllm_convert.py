"""``mixpert convert --whole``: a vision-language model on disk gets its experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _mllms import KINDS
from safetensors.torch import load_file, save_file
from test_mllm_saving import load, same_state

from mixpert_kernels import cli
from mixpert_kernels.hf.mllm import unmixpertize

FILES = ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    directory = tmp_path / "plain"
    model = KINDS["llava_next"].build().to(torch.bfloat16)
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(directory, max_shard_size="20KB")
    for name in FILES:
        (directory / name).write_text(json.dumps({"from": name}))
    return directory


def convert(*argv: object) -> int:
    return cli.main(["convert", *map(str, argv)])


def test_convert_the_whole_model(plain, tmp_path, capsys):
    out = tmp_path / "mixed"
    names = ["--expert-names", "versatile,photo,chart"]
    for _ in range(2):  # onto its own result too
        assert convert(plain, "--whole", "--experts", 3, "--layers", 1, *names, "--out", out) == 0
    assert (
        "3 experts of 1 vision layers and the projector of a llava_next" in capsys.readouterr().out
    )
    assert [(out / name).read_text() for name in FILES] == [(plain / n).read_text() for n in FILES]
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77
    model = load(out)
    assert model.config.mixpert["expert_names"] == ["versatile", "photo", "chart"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_state(unmixpertize(model, "chart"), load(plain))
    shards = [path.name for path in out.iterdir() if "safetensors" in path.name]
    assert shards == ["model.safetensors"]  # the plain model's are not copied


def test_convert_refuses_what_it_cannot(plain, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    mixed = tmp_path / "mixed"
    assert convert(plain, "--whole", "--out", mixed) == 0
    capsys.readouterr()
    for argv, match in (
        ([llama, "--whole", *out], "FAMILIES in mixpert_kernels/hf/mllm/families.py"),
        ([mixed, "--whole", *out], "it is a mixpertized model already"),
        ([tmp_path / "none", "--whole", *out], "directory must exist"),
        ([plain, "--whole", "--layers", 9, *out], "expert_layers must lie in 1..3"),
        ([plain, "--whole", "--projector-dim", 8, *out], "--whole must come without"),
        ([plain, "--whole", "--out", llama], "must not hold another model"),
        ([plain, "--out", mixed], "must not hold another model"),
    ):
        assert convert(*argv) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and match in error[0]
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_checkpoint_that_lacks_a_parameter(plain, tmp_path, capsys):
    shard = next(path for path in plain.glob("model-*.safetensors"))
    state = load_file(shard)
    lost = next(iter(state))
    del state[lost]
    save_file(state, shard, {"format": "pt"})
    assert convert(plain, "--whole", "--out", tmp_path / "out") == 1
    assert "parameters, got missing keys" in capsys.readouterr().err
