"""LoRA of the language model beside experts."""

from __future__ import annotations

import copy
import json
import sys

import peft
import pytest
import torch
from _mllms import IMAGE, KINDS, Kind
from peft.tuners.lora import LoraLayer
from test_mllm_parity import assert_close, expert_modules, mixed
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from mixpert_kernels.hf.mllm import (
    forced_routing,
    lora_config,
    mixpertize,
    record_routing,
    unmixpertize,
)

families = pytest.mark.parametrize("family", KINDS)
LLM = r".*\.(language|text)_model\.layers\.\d+\."
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {  # what is asked for, and which of a decoder layer's linear layers that is
    "one name": (["q_proj"], ("q_proj",)),
    "names": (["v_proj", "mlp.down_proj"], ("v_proj", "down_proj")),
    "all-linear": ("all-linear", LINEARS),
    "regex": (LLM + r".*(q|o)_proj", ("q_proj", "o_proj")),
    "wide regex": (r".*\.(q|k|v)_proj", ("q_proj", "k_proj", "v_proj")),
}


def tuned_of(model: nn.Module, targets: object = "all-linear", **options: object) -> nn.Module:
    """A PeftModel whose adapter changes what the model gives."""
    torch.manual_seed(0)
    config = lora_config(model, targets, **{"r": 2, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config)


def batch(kind: Kind, prompts: str = "batch") -> dict[str, Tensor]:
    inputs = kind.call(kind.prompts[prompts])
    ids = inputs["input_ids"]
    return {**inputs, "labels": ids.masked_fill((ids == IMAGE) | (ids == 0), -100)}


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@families
@pytest.mark.parametrize("asked", TARGETS)
def test_only_linear_layers_of_the_language_model_are_adapted(family, asked):
    targets, leaves = TARGETS[asked]
    model = mixed(KINDS[family])
    decoder = next(n for n, _ in model.named_modules() if n.endswith(("guage_model", "text_model")))
    tuned = tuned_of(model, targets)
    found = {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert found == {
        f"{decoder}.layers.{i}.{'mlp' if leaf in mlp else 'self_attn'}.{leaf}"
        for i in range(2)
        for leaf in leaves
    }
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_training_step_moves_the_adapter_alone(family, checkpointing):
    kind = KINDS[family]
    tuned = tuned_of(mixed(kind, distinct=True)).train()
    if checkpointing:
        tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable()
    before = state_of(tuned)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    with forced_routing(tuned, 1), record_routing(tuned) as records:
        tuned(**batch(kind)).loss.backward()
    optimizer.step()
    assert len(records) == 1 and set(records[0].expert.tolist()) == {1}
    moved = {n for n, p in state_of(tuned).items() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if ".lora_" in name}


@families
@torch.no_grad()
def test_the_adapter_is_saved_loaded_and_merged(family, tmp_path):
    """In float64, for merging rounds the weights."""
    kind = KINDS[family]
    model, inputs = mixed(kind, distinct=True).double(), wide(kind.call(kind.prompts["batch"]))
    model.save_pretrained(tmp_path / "base")
    before = model(**inputs).logits
    tuned = tuned_of(model).eval()
    after = tuned(**inputs).logits
    assert float((after - before).abs().max()) > 1e-2
    with tuned.disable_adapter():
        assert_close(tuned(**inputs).logits, before)

    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again(**inputs).logits, after)

    merged = again.merge_and_unload()
    assert type(merged) is type(model) and not any("lora_" in n for n in merged.state_dict())
    with record_routing(merged) as records:
        assert_close(merged(**inputs).logits, after)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)
    plain = unmixpertize(merged, int(records[0].expert[0]))
    assert not hasattr(plain.config, "mixpert")
    assert_close(plain(**inputs).logits[0], after[0])  # a prompt of one image


@families
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@torch.no_grad()
def test_routes_are_seen_and_forced_through_peft(family, task):
    kind = KINDS[family]
    model, inputs = mixed(kind, distinct=True), kind.call(kind.prompts["batch"])
    with record_routing(model) as wanted:
        model(**inputs)
    tuned = tuned_of(model, task_type=task).eval()
    options = {"max_new_tokens": 2, "return_dict_in_generate": True}
    with record_routing(tuned) as records:
        output = tuned.generate(**inputs, **options)
        assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 2
        tuned(**inputs)
        with forced_routing(tuned, 2):
            forced = tuned.generate(**inputs, **options)
    for record in (*output.router, *records[:2]):
        assert torch.equal(record.expert, wanted[0].expert)
    assert set(forced.router[0].expert.tolist()) == {2} and len(records) == 3


@pytest.mark.parametrize(
    "family, projector",
    [
        ("llava_onevision", "multi_modal_projector"),
        ("idefics3", "connector"),
        ("qwen2_vl", "merger"),
    ],
)
def test_the_router_and_the_projector_train_beside_the_adapter(family, projector, tmp_path):
    kind = KINDS[family]
    model, inputs = mixed(kind, distinct=True), batch(kind)
    start = copy.deepcopy(model)
    tuned = tuned_of(model, modules_to_save=["mixpert_router", projector]).train()
    before = state_of(tuned)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert {n.split(".modules_to_save.")[0].rpartition(".")[2] for n in trained} == {
        "mixpert_router",
        projector,
    }
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    with forced_routing(tuned, [0, 2, 0, 0]), record_routing(tuned) as records:
        loss = tuned(**inputs).loss - records[0].scores[:, 1].log().sum()
    loss.backward()
    optimizer.step()
    moved = {n for n, p in state_of(tuned).items() if not torch.equal(p, before[n])}
    assert {n for n in moved if ".lora_" not in n} == set(trained)
    weight = next(p for n, p in tuned.named_parameters() if n in trained and p.ndim == 3)
    assert weight.grad.abs().amax((1, 2)).bool().tolist() == [True, False, True]

    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(start, tmp_path)
    tuned.eval()
    with torch.no_grad(), record_routing(tuned) as ours, record_routing(again) as theirs:
        assert torch.equal(again(**inputs).logits, tuned(**inputs).logits)
        assert torch.equal(theirs[0].scores, ours[0].scores)
        merged = tuned.merge_and_unload()
        assert_close(merged(**inputs).logits, again(**inputs).logits)
    assert len(expert_modules(merged)) == 3
    assert not any("modules_to_save" in n for n in merged.state_dict())


@torch.no_grad()
def test_transformers_own_adapters(tmp_path, monkeypatch):
    """model.add_adapter, and from_pretrained of a directory that holds an adapter.

    transformers 5.24 asks for a PEFT that is not released yet, and does nothing here that needs it.
    """
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    kind = KINDS["gemma3"]
    model, inputs = mixed(kind, distinct=True), kind.call([[1, 1]])
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model.add_adapter(lora_config(model, ["q_proj"], r=2, init_lora_weights=False))
    wanted = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(**inputs).logits, wanted)
    second = lora_config(model, ["q_proj", "k_proj"])
    model.add_adapter(second, "second")
    found = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert len(found) == 4 and all("language_model" in name for name in found)


def test_what_the_caller_excludes_is_excluded_too():
    model = mixed(KINDS["llava"])
    for more in (r".*layers\.0\..*", ["layers.0.self_attn.q_proj"]):
        tuned = tuned_of(copy.deepcopy(model), ["q_proj"], exclude_modules=more)
        found = [n for n, m in tuned.named_modules() if isinstance(m, LoraLayer)]
        assert len(found) == 1 and "language_model.layers.1" in found[0]


def test_options_are_loraconfigs():
    config = lora_config(mixed(KINDS["llava"]), ["q_proj"], r=3, lora_alpha=5, use_rslora=True)
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 5, True)
    with pytest.raises(TypeError, match="rank"):
        lora_config(mixed(KINDS["llava"]), ["q_proj"], rank=3)


def test_a_bare_name_without_lora_config_is_refused_for_it_matches_experts():
    with pytest.raises(ValueError, match="Target module GroupedLinear"):
        peft.get_peft_model(mixed(KINDS["llava"]), peft.LoraConfig(target_modules=["q_proj"]))


def test_an_adapted_vision_side_is_neither_given_experts_nor_freed_of_them():
    """Or the adapter of a cloned block would be cloned, and a wrapped projector keep its experts."""
    plain = KINDS["llava"].build()
    names = list(plain.state_dict())
    peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^mixpertize: .* no adapter in its vision side, got a L"):
        mixpertize(plain)
    plain = KINDS["llava"].build()
    tuned = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"]))
    assert mixpertize(tuned.merge_and_unload()) is plain

    model = mixed(KINDS["llava"])
    config = lora_config(model, ["q_proj"], modules_to_save=["multi_modal_projector"])
    tuned = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"^unmixpertize: .* no adapter in its vision side, got a"):
        unmixpertize(model)
    assert list(unmixpertize(tuned.merge_and_unload()).state_dict()) == names


@pytest.mark.parametrize(
    "targets, match",
    [
        (["q_proj", "query"], "must be names of layers in the language model, got query$"),
        (["fc1"], "must be names of layers in the language model, got fc1$"),
        ("q_proj", "must be a regex of whole names of layers in the language model, got q_proj$"),
        ([], r"target_modules must not be empty, got \[\]$"),
    ],
)
def test_what_matches_nothing_is_an_error(targets, match):
    with pytest.raises(ValueError, match=match):
        lora_config(mixed(KINDS["llava"]), targets)


def test_bad_models_are_errors():
    plain = KINDS["llava"].build()
    with pytest.raises(
        ValueError, match=r"^lora_config: model must be a mixpertized .*, got a plain Llava"
    ):
        lora_config(plain)
    both = nn.ModuleList([mixpertize(plain), mixed(KINDS["llava"])])
    with pytest.raises(ValueError, match="got 2 in a ModuleList"), forced_routing(both, 0):
        pass
    tuned = tuned_of(plain)
    with pytest.raises(ValueError, match="model must be taken out of its PeftModel first"):
        unmixpertize(tuned)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"extra 'lora' does: pip install -e \"\.\[lora\]\""):
        lora_config(mixed(KINDS["llava"]))
