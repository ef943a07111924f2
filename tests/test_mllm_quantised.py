"""Mixpertized models whose language model bitsandbytes quantises; the vision side stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _mllms import KINDS, Kind
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from test_mllm_parity import assert_close, expert_modules, mixed, projected
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from mixpert_kernels.hf.mllm import forced_routing, lora_config, record_routing, unmixpertize

bitsandbytes = pytest.importorskip("bitsandbytes")
families = pytest.mark.parametrize("family", KINDS)
# Layers wide enough for bitsandbytes' 4-bit kernel on a CPU.
WIDTH = 64
WIDE = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": 8}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4}
BITS = {
    8: {"load_in_8bit": True},
    4: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
bits = pytest.mark.parametrize("bits", BITS)
LEAF = {8: "Linear8bitLt", 4: "Linear4bit"}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(kind: Kind) -> nn.Module:
    """With a projector as wide as the language model, whatever its width is called."""
    vision, fields = dict(kind.config["vision_config"]), {}
    for name in {"projection_dim", "out_hidden_size"} & vision.keys():
        vision[name] = WIDTH
    if "embed_dim" in vision:
        vision["hidden_size"] = WIDTH
    if "projection_dim" in kind.config:
        fields["projection_dim"] = WIDTH
    return kind.build(
        text_config={**kind.config["text_config"], **WIDE}, vision_config=vision, **fields
    )


def features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(projected(model, inputs)))


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, **options
    ).eval()


def quantised(model: nn.Module, bits: int) -> set[str]:
    return {name for name, m in model.named_modules() if type(m).__name__ == LEAF[bits]}


def linears(model: nn.Module) -> set[str]:
    """The language model's."""
    decoder = model.get_decoder()
    (path,) = [name for name, m in model.named_modules() if m is decoder]
    return {f"{path}.{n}" for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}


@families
@bits
def test_the_language_model_is_quantised_and_the_vision_side_is_not(family, bits, tmp_path):
    """Its features are bitwise those of the whole model."""
    kind = KINDS[family]
    model, inputs = mixed(kind, True, build(kind)), kind.call(kind.prompts["batch"])
    model.save_pretrained(tmp_path / "whole")
    model = load(tmp_path / "whole")
    small = load(tmp_path / "whole", quantization_config=BitsAndBytesConfig(**BITS[bits]))
    assert quantised(small, bits) == linears(model)
    for expert in (None, 1):
        with forced_routing(model, expert), forced_routing(small, expert):
            assert torch.equal(features(small, inputs), features(model, inputs))
    with record_routing(model) as wanted, record_routing(small) as records:
        logits, close = model(**inputs).logits, small(**inputs).logits
    assert torch.equal(records[0].scores, wanted[0].scores)
    assert torch.equal(records[0].expert, wanted[0].expert)
    assert close.isfinite().all() and not torch.equal(close, logits)

    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = small.generate(**inputs, **options)
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 3
    assert torch.equal(output.router[0].expert, wanted[0].expert)

    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert quantised(again, bits) == quantised(small, bits)
    assert torch.equal(features(again, inputs), features(model, inputs))
    assert torch.equal(again(**inputs).logits, close)


@bits
def test_what_the_caller_skips_is_skipped_too(bits, tmp_path):
    kind = KINDS["llava"]
    model = mixed(kind, True, build(kind))
    model.save_pretrained(tmp_path)
    skip = ["lm_head", "model.language_model.layers.1"]
    asked = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=skip)
    small = load(tmp_path, quantization_config=asked)
    assert quantised(small, bits) == {n for n in linears(model) if ".layers.0." in n}
    assert asked.llm_int8_skip_modules == skip


@bits
def test_an_expert_is_taken_out_of_a_quantised_model(bits, tmp_path):
    kind = KINDS["llava_onevision"]
    model, inputs = mixed(kind, True, build(kind)), kind.call([[3], [5]])
    model.save_pretrained(tmp_path)
    small = load(tmp_path, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    with forced_routing(small, 2):
        wanted = features(small, inputs)
    plain = unmixpertize(small, 2)
    assert not expert_modules(plain) and quantised(plain, bits)
    assert torch.allclose(features(plain, inputs), wanted, rtol=1e-5, atol=1e-5)


@bits
def test_lora_on_a_quantised_language_model(bits, tmp_path):
    kind = KINDS["gemma3"]
    model, inputs = mixed(kind, True, build(kind)), kind.call([[1, 1]])
    model.save_pretrained(tmp_path)
    small = load(tmp_path, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    with forced_routing(small, 1):
        wanted = features(small, inputs)
    tuned = get_peft_model(small, lora_config(small, r=2, modules_to_save=["mixpert_router"]))
    found = {n for n, m in small.named_modules() if isinstance(m, LoraLayer)}
    assert found == linears(load(tmp_path))
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    trained = [p for p in tuned.parameters() if p.requires_grad]
    with torch.enable_grad(), forced_routing(tuned, 1), record_routing(tuned) as records:
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        (loss - records[0].scores.log().sum()).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_B." in n or "mixpert_router.modules_to_save" in n for n in moved)
    assert any("mixpert_router" in name for name in moved)
    with forced_routing(tuned, 1):
        assert torch.equal(features(small, inputs), wanted)


@bits
def test_a_quantised_model_is_given_experts_where_its_vision_side_is_whole(bits, tmp_path):
    kind = KINDS["llava_onevision"]
    build(kind).save_pretrained(tmp_path)
    inputs = kind.call([[3], [5]])
    skip = ["lm_head", r".*\.vision_tower", r".*\.multi_modal_projector"]
    whole = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=skip)
    plain, model = (load(tmp_path, quantization_config=whole) for _ in range(2))
    mixed(kind, False, model)
    assert quantised(model, bits) == quantised(plain, bits) == linears(load(tmp_path))
    assert_close(features(model, inputs), features(plain, inputs))
    with record_routing(model) as records:
        assert model(**inputs).logits.isfinite().all()
    assert len(records) == 1
    every = load(tmp_path, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    with pytest.raises(ValueError, match=f"not quantised, got a {LEAF[bits]}: llm_int8_skip"):
        mixed(kind, False, every)
    assert not hasattr(every.config, "mixpert")
