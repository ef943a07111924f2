"""mome.save and mome.load: bit for bit, whole or by reference, and every fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _mome import HOLDER, PROCESSORS, encoders, llm, logits, make, write_bert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixpert_kernels import Grids
from mixpert_kernels.hf import mome
from mixpert_kernels.modules.move import Features

Model = mome.MomeForConditionalGeneration


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of an LLM, the encoders with their image processors, and a sentence encoder."""
    root = tmp_path_factory.mktemp("parts")
    llm(tie_word_embeddings=True).save_pretrained(root / "llm")
    for name, encoder in encoders().items():
        encoder.save_pretrained(root / name)
        PROCESSORS[name].save_pretrained(root / name)
    write_bert(root / "bert")
    return root


@pytest.fixture(scope="module")
def model(parts: Path) -> Model:
    return make(
        llm=parts / "llm",
        encoders={name: parts / name for name in PROCESSORS},
        sentence_encoder=parts / "bert",
        processors=None,
    )


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "mome"
    mome.save(model, directory)
    return directory


def assert_same(one: Model, other: Model) -> None:
    """Every parameter, what they compute, and which of them train."""
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    assert a.keys() == b.keys()
    for name, parameter in a.items():
        assert parameter.dtype == b[name].dtype and torch.equal(parameter, b[name]), name
        assert parameter.requires_grad == b[name].requires_grad, name
    assert torch.equal(logits(one), logits(other)) and not other.training
    assert one.options == other.options and one.image_token_id == other.image_token_id == HOLDER


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 4000}], ids=["one file", "shards"])
def test_a_loaded_model_is_bitwise_the_saved(model, options, tmp_path):
    mome.save(model, tmp_path / "mome", **options)
    shards = list((tmp_path / "mome").glob("model-*.safetensors"))
    assert bool(shards) == bool(options)
    assert_same(model, mome.load(tmp_path / "mome"))


@pytest.mark.parametrize("change", [{"experts": 1}, {"experts": 0}, {"mix": "addition"}])
def test_other_forms(change, tmp_path):
    model = make(**change)
    mome.save(model, tmp_path)
    again = mome.load(tmp_path, sentence_encoder=model.sentence_encoder)
    assert_same(model, again)
    assert again.experts == change.get("experts", 4)


def test_stage_two_of_a_loaded_stage_one(tmp_path):
    model = make(experts=1)
    mome.save(model, tmp_path / "one")
    again = mome.load(tmp_path / "one", sentence_encoder=model.sentence_encoder)
    mome.reclone_language_experts(again.llm, 3)
    mome.save(again, tmp_path / "two")
    two = mome.load(tmp_path / "two", sentence_encoder=model.sentence_encoder)
    assert two.experts == 3
    assert torch.equal(logits(two), logits(again))


def test_dtypes_and_devices(parts, saved, tmp_path):
    half = mome.load(saved, dtype=torch.bfloat16, device="cpu")
    kinds = {p.dtype for n, p in half.named_parameters() if not n.startswith("sentence_encoder")}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in half.sentence_encoder.parameters()} == {torch.float32}
    load = transformers.AutoModelForCausalLM.from_pretrained  # rotary frequencies stay float32
    mixed = make(llm=load(parts / "llm", dtype=torch.bfloat16), dtype=torch.float32)
    mome.save(mixed, tmp_path)
    assert_same(mixed, mome.load(tmp_path, sentence_encoder=mixed.sentence_encoder))


def test_references_are_noted_and_not_copied(model, parts, tmp_path):
    mome.save(model, tmp_path / "mome")
    mome.save(model, tmp_path / "mome", reference=True)
    assert sorted(p.name for p in (tmp_path / "mome").iterdir()) == [
        "config.json",
        "model.safetensors",
        "processors",
    ]
    again = mome.load(tmp_path / "mome")
    assert_same(model, again)
    mome.save(again, tmp_path / "next", reference=["llm", "pix"])
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert config["llm"] == str(parts / "llm") and config["encoders"]["clip"] == "encoders/clip"
    assert_same(model, mome.load(tmp_path / "next"))
    whole = mome.load(tmp_path / "next", sentence_encoder=parts / "bert")
    for names, text in (
        (["mole"], "reference must be of llm, clip, dino, pix, sentence_encoder, got mole"),
        (["clip"], r"must be to a directory outside .*next, got .*encoders/clip"),
    ):
        with pytest.raises(ValueError, match=text):
            mome.save(whole, tmp_path / "next", reference=names)
    with pytest.raises(
        ValueError, match="must name parts that were built from a directory, got llm"
    ):
        mome.save(make(), tmp_path / "none", reference="llm")


def test_unfrozen_parameters_are_saved_beside_a_reference(parts, tmp_path):
    model = make(llm=parts / "llm")
    norm = model.llm.model.norm.weight.requires_grad_()
    with torch.no_grad():
        norm.add_(1)
    mome.save(model, tmp_path, reference=["llm"])
    assert_same(model, mome.load(tmp_path, sentence_encoder=model.sentence_encoder))


class Mean(nn.Module):
    """An encoder of one's own."""

    width = 3

    def forward(self, pixel_values: Tensor) -> Features:
        rows = pixel_values.flatten(2).transpose(1, 2).flatten(0, 1)
        return Features(rows, Grids.same(len(pixel_values), *pixel_values.shape[2:]))


def test_what_is_no_transformers_model_is_given_again(tmp_path):
    readers = {
        "mine": lambda images, return_tensors: {"pixel_values": torch.ones(len(images), 3, 4, 4)}
    }
    model = make(encoders={"mine": Mean()}, processors=readers, options={"transform": "pool"})
    mome.save(model, tmp_path)
    given: dict[str, Any] = {"sentence_encoder": model.sentence_encoder, "processors": readers}
    assert_same(model, mome.load(tmp_path, encoders={"mine": Mean()}, **given))
    with pytest.raises(
        ValueError, match="encoder 'mine' must be given, got None: it was not saved"
    ):
        mome.load(tmp_path, **given)
    bare = mome.load(tmp_path, encoders={"mine": Mean()})
    assert bare.sentence_encoder is None and bare.processor.processors == {}


def test_an_llm_of_ones_own_choice(model, saved):
    other = llm(seed=7)
    again = mome.load(saved, llm=other)
    assert again.llm is other and "llm" not in again.sources
    assert torch.equal(again.layers[0].up, model.layers[0].up)


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def _weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors")

    return edit


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


FAULTS = {
    "another K": (
        _edit(lambda c: c.update(experts=3)),
        "experts in .*config.json must be the number of adapters in the weights, 4, got 3",
    ),
    "a missing key": (
        _weights(lambda s: s.pop("move.branches.pix.proj.bias")),
        r"missing keys: move\.branches\.pix\.proj\.bias",
    ),
    "an unexpected key": (
        _weights(lambda s: s.update(more=torch.ones(1))),
        "unexpected keys: more",
    ),
    "another shape": (
        _weights(lambda s: s.update({"move.router.0.bias": torch.ones(9)})),
        r"mismatched keys: move\.router\.0\.bias \(9,\) for \(8,\)",
    ),
    "a missing encoder": (
        _edit(lambda c: c["encoders"].update(dino="encoders/none")),
        "encoder 'dino' must be in .*none, got no such directory",
    ),
    "a missing llm": (
        _edit(lambda c: c.update(llm="/nowhere/llm")),
        "llm must be in /nowhere/llm, got no such directory",
    ),
    "no image processor": (
        lambda d: next((d / "processors" / "pix").iterdir()).unlink(),
        "image processor must be in .*pix, got none",
    ),
    "another format": (
        _edit(lambda c: c.update(mixpert_format=9)),
        "mixpert_format 9, not 1: another version of mixpert_kernels wrote it",
    ),
    "another model": (_edit(lambda c: c.update(model_type="llama")), "model_type llama"),
    "an unknown unfrozen": (
        _edit(lambda c: c.update(unfrozen=["llm.x"])),
        "unfrozen in .* must name the LLM's parameters, got llm.x",
    ),
    "a cut file": (_truncate, "must be a whole saved MoME model, got: "),
    "no file": (
        lambda d: (d / "model.safetensors").unlink(),
        "must be a whole saved MoME model, got: no model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, model, tmp_path):
    change, text = FAULTS[fault]
    mome.save(model, tmp_path, reference=True)
    change(tmp_path)
    with pytest.raises(ValueError, match=text):
        mome.load(tmp_path)


def test_bad_arguments_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match="directory must exist"):
        mome.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r'dtype must be a torch.dtype or "auto", got bfloat16'):
        mome.load(saved, dtype="bfloat16")


def test_an_interrupted_save_leaves_the_old_one(model, tmp_path, monkeypatch):
    mome.save(model, tmp_path / "mome")
    newer = make(seed=1)
    assert not torch.equal(logits(newer), logits(model))

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mixpert_kernels.hf.mome.saving.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        mome.save(newer, tmp_path / "mome")
    assert [p.name for p in tmp_path.iterdir()] == ["mome"]
    assert_same(model, mome.load(tmp_path / "mome"))


def test_what_cannot_be_saved_whole(tmp_path):
    model = make()
    model.llm.hf_quantizer = object()
    with pytest.raises(ValueError, match="llm must not be quantised to be saved whole"):
        mome.save(model, tmp_path / "a")
    model.llm = nn.Sequential(model.llm)
    with pytest.raises(ValueError, match="llm must be a transformers model, got a Sequential"):
        mome.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_saved_llm_is_a_plain_one(saved):
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved / "llm")
    names = plain.state_dict().keys()
    assert "model.layers.0.mlp.gate_proj.weight" in names and not any("ffn" in n for n in names)
    ids = torch.tensor([[1, 5, 6]])
    mome.remove_language_experts(again := mome.load(saved).llm)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, again(ids).logits)
