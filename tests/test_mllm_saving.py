"""Mixpertized models on disk, by transformers' own save_pretrained and Auto class."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _mllms import EXPERTS, KINDS
from safetensors.torch import load_file, save_file
from test_mllm_parity import mixed
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from mixpert_kernels.hf.mllm import forced_routing, mixpertize, record_routing, unmixpertize

families = pytest.mark.parametrize("family", KINDS)
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def load(directory: Path, **options: object) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(directory, **options)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


@families
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_original_to_mixpertized_to_disk_and_back(family, tied, tmp_path):
    kind = KINDS[family]
    original = kind.build(tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "original")
    model = load(tmp_path / "original")
    assert type(model) is type(original) and same_state(model, original)
    plain = json.loads(model.config.to_json_string())

    mixed(kind, model=model, distinct=True)
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert type(again) is type(model) and same_state(again, model)
    tables = [
        m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, again)
    ]
    assert tables == [tied, tied]
    inputs = kind.call(kind.prompts["batch"])
    with record_routing(again) as records:
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert len(records) == 1
    saved = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert saved.pop("mixpert")["num_experts"] == EXPERTS
    places = saved.pop("auto_map").values()
    assert set(places) == {f"modeling_mixpert.{type(original).__name__}"}
    assert saved == plain


@families
def test_the_plain_model_of_an_expert_is_saved_as_one(family, tmp_path):
    kind = KINDS[family]
    mixed(kind, distinct=True).save_pretrained(tmp_path / "mixed")
    model, path = unmixpertize(load(tmp_path / "mixed"), 1), tmp_path / "plain"
    model.save_pretrained(path)
    again = type(model).from_pretrained(path)
    assert same_state(again, model)
    assert not {"mixpert", "auto_map"} & json.loads((path / "config.json").read_text()).keys()
    assert not list(path.glob("*.py"))


def test_shards_and_dtype(tmp_path):
    kind = KINDS["gemma3"]
    model = mixed(kind, distinct=True, router_hidden=8).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load(tmp_path)
    assert same_state(again, model)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    wide = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_the_model_without_a_head(tmp_path):
    """What AutoModel makes of a family, saved and loaded by it."""
    model = mixed(KINDS["llava"], distinct=True).model
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model) and same_state(again, model)
    places = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert places == {"AutoModel": "modeling_mixpert.LlavaModel"}


def test_code_of_others_in_auto_map_is_kept(tmp_path):
    model = mixed(KINDS["llava"])
    theirs = {"AutoProcessor": "processing.Theirs"}
    model.config.auto_map = dict(theirs)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"].items() > theirs.items()
    assert unmixpertize(load(tmp_path)).config.auto_map == theirs


def test_only_the_main_process_writes(tmp_path):
    mixed(KINDS["llava"]).save_pretrained(tmp_path / "no", is_main_process=False)
    assert not list((tmp_path / "no").glob("*"))


def test_a_plain_checkpoint_loads_as_it_did(tmp_path):
    """A missing parameter is made up, as transformers does; only mixpertized models are strict."""
    kind = KINDS["llava"]
    kind.build().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    _without("lm_head")(state)
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    model, info = load(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert not hasattr(model.model, "mixpert_router")


def test_settings_come_back(tmp_path):
    kind = KINDS["llava"]
    names = ["versatile", "chart", "document"]
    options = {"routing": "score_threshold", "tau": 0.7, "expert_layers": 1, "expert_names": names}
    model = mixed(kind, **options)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.model.mixpert_settings == model.model.mixpert_settings
    assert again.config.mixpert["tau"] == 0.7
    with pytest.raises(ValueError, match="got a mixpertized model"):
        mixpertize(again)
    again.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), model)


def test_a_model_from_the_configuration_alone_has_experts():
    kind = KINDS["internvl"]
    model = mixed(kind)
    made = AutoModelForImageTextToText.from_config(model.config)
    assert type(made) is type(model) and list(made.state_dict()) == list(model.state_dict())
    plain = AutoModelForImageTextToText.from_config(kind.build().config)
    assert not hasattr(plain.model, "mixpert_router")


def faulty(tmp_path: Path, change: object) -> Path:
    mixed(KINDS["llava"]).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    return tmp_path


def _without(part: str) -> object:
    def change(state: dict) -> None:
        del state[next(name for name in state if part in name)]

    return change


@pytest.mark.parametrize(
    "part", ["lm_head", "mixpert_router", "layers.1.mlp.fc1.weight", "linear_2"]
)
def test_a_missing_parameter_is_an_error(part, tmp_path):
    with pytest.raises(ValueError, match=rf"exactly .* got missing keys: \S*{part}"):
        load(faulty(tmp_path, _without(part)))


def test_an_unexpected_parameter_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"got unexpected keys: model\.more"):
        load(faulty(tmp_path, lambda state: state.update({"model.more": torch.ones(2)})))


def test_another_number_of_experts_is_an_error(tmp_path):
    path = faulty(tmp_path, lambda state: None)
    config = json.loads((path / "config.json").read_text())
    config["mixpert"]["num_experts"] = 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"as many experts as the weights, 3, got num_experts 2$"):
        load(path)


def test_another_shape_is_an_error(tmp_path):
    wide = {"model.multi_modal_projector.linear_2.bias": torch.ones(EXPERTS, 17)}
    with pytest.raises(
        ValueError, match=r"mismatched keys: \S*linear_2.bias \[3, 17\] for \[3, 16\]$"
    ):
        load(faulty(tmp_path, lambda state: state.update(wide)))


@pytest.mark.parametrize("found", [3, {"experts": 3}])
def test_settings_that_are_none_are_an_error(found, tmp_path):
    path = faulty(tmp_path, lambda state: None)
    config = json.loads((path / "config.json").read_text())
    config["mixpert"] = found
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.mixpert must hold .*, got"):
        load(path)


def test_the_plain_class_refuses_a_mixpertized_checkpoint(tmp_path):
    mixed(KINDS["llava"]).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(KINDS["llava"].build()).from_pretrained(tmp_path)


@pytest.mark.skipif(platform.system() != "Linux", reason="bitsandbytes comes with Linux alone")
def test_a_quantizer_leaves_the_vision_side_and_what_it_is_told_alone(tmp_path):
    kind, skip = KINDS["idefics3"], ["lm_head", "down_proj"]
    mixed(kind, distinct=True).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    config, whole = AutoConfig.from_pretrained(tmp_path), load(tmp_path)
    model = load(tmp_path, config=config, quantization_config=asked)
    leaves = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = {name for name, leaf in leaves.items() if leaf == "Linear"}
    for name in leaves:
        spared = not name.startswith("model.text_model.") or name.endswith("down_proj")
        assert (name in kept) == spared, name
    pixels = kind.call([[3]])["pixel_values"]
    with (
        forced_routing(model, 1, image_of_tile=[0] * 3),
        forced_routing(whole, 1, image_of_tile=[0] * 3),
    ):
        got, wanted = (m.model.get_image_features(pixels).pooler_output for m in (model, whole))
    assert torch.equal(torch.cat([*got]), torch.cat([*wanted]))
    assert asked.llm_int8_skip_modules == skip  # the caller's own object
