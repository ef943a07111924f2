"""Which ops a tower calls, found without its weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, LlavaConfig, SiglipVisionConfig, SiglipVisionModel

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.hf import widths


def names(work: widths.Workload) -> set[tuple[str, tuple[int, ...]]]:
    return {(call.op, call.widths) for call in work.calls}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_tower_calls_is_found_without_its_weights(tmp_path, device):
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = SiglipVisionConfig(hidden_size=24, intermediate_size=40, **sizes)
    projector = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.GELU())
    tower = FusedMixpertTower.from_vision_model(
        SiglipVisionModel(config), projector, num_experts=3, expert_layers=1, router_hidden=20
    )
    tower.save_pretrained(tmp_path / "tower")
    for weights in (tmp_path / "tower").glob("*.safetensors"):
        weights.unlink()
    found = widths.of_directory(tmp_path / "tower", experts=9, device=device)
    assert (found.tokens, found.experts) == (16, 3)
    fused = {("norm_grouped_linear", (24, 72)), ("grouped_linear", (24, 24))}
    if device == "cuda":
        fused |= {("norm_grouped_linear", (24, 40)), ("grouped_linear", (40, 24))}
    training = {("grouped_layer_norm", (24,)), ("grouped_linear", (24, 72))}
    training |= {("grouped_mlp", (24, 40, 24))}
    router = {("route", (24, 20, 3)), ("route_grouped_linear", (24, 72))}
    assert names(found) == fused | training | router | {("grouped_linear", (24, 16))}
    assert next(c for c in found.calls if c.widths == (24, 72)).parts == (24, 24, 24)
    config.save_pretrained(tmp_path / "model")
    found = widths.of_directory(tmp_path / "model", experts=2, device=device)
    assert found.experts == 2 and names(found) == fused | training | {
        ("route", (24, 2)), ("route_grouped_linear", (24, 72))
    }  # fmt: skip


def test_what_other_models_call(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    swiglu = Dinov2Config(**sizes, use_swiglu_ffn=True, image_size=28, patch_size=14)
    swiglu.save_pretrained(tmp_path / "dino")
    found = widths.of_directory(tmp_path / "dino", experts=2, device="cuda")
    assert found.tokens == 5 and ("grouped_linear", (24, 24)) in names(found)
    assert not any("route_" in op for op, _ in names(found))  # leaves, no fused plan
    sizes |= {"intermediate_size": 40}
    text = sizes | {"model_type": "llama", "vocab_size": 99, "num_key_value_heads": 2}
    vision = sizes | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    LlavaConfig(vision_config=vision, text_config=text | {"hidden_size": 32}).save_pretrained(
        tmp_path / "llava"
    )
    assert ("grouped_mlp", (24, 32, 32)) in names(
        widths.of_directory(tmp_path / "llava", 2, "cuda")
    )


def test_the_named_geometries_are_the_models():
    found = widths.of_sizes(widths.GEOMETRIES["so400m"], 4, "cuda")
    assert {("route_grouped_linear", (1152, 3456)), ("grouped_mlp", (1152, 3584, 3584))} <= names(
        found
    )
    assert (found.tokens, found.experts) == (729, 4)
