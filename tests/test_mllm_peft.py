"""LoRA of the language model beside experts."""

from __future__ import annotations

import copy

import pytest
import torch
from _mllms import KINDS
from peft import LoraConfig, get_peft_model
from test_mllm_parity import assert_close, mixed

from mixpert_kernels.hf.mllm import record_routing, unmixpertize

LLM = r".*language_model.*\.(q|v)_proj"  # as in docs/mllm.md


def test_a_bare_name_is_refused_for_it_matches_experts():
    with pytest.raises(ValueError, match="Target module GroupedLinear"):
        get_peft_model(mixed(KINDS["llava"]), LoraConfig(target_modules=["q_proj"]))


@torch.no_grad()
def test_lora_on_the_language_model():
    kind = KINDS["llava_onevision"]
    model = mixed(kind, distinct=True)
    inputs = kind.call(kind.prompts["batch"])
    before = model(**inputs).logits
    torch.manual_seed(0)
    config = LoraConfig(target_modules=LLM, init_lora_weights=False)
    tuned = get_peft_model(model, config)
    with record_routing(model) as records:
        after = tuned(**inputs).logits
        with tuned.disable_adapter():
            assert_close(tuned(**inputs).logits, before)
    assert float((after - before).abs().max()) > 1e-2
    assert len(records) == 2 and torch.equal(records[0].expert, records[1].expert)
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert_close(merged(**inputs).logits, after)
    assert not hasattr(unmixpertize(merged, 0).config, "mixpert")
