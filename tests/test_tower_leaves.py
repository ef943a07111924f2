"""Leaves that are no longer what they were: hooked, wrapped, adapted, dropping out."""

from __future__ import annotations

import pytest
import torch
from _towers import (
    EXPERTS,
    KINDS,
    assert_close,
    error,
    make,
    pixels,
    plain,
    projector,
    routing,
    run,
    substituted,
)
from torch import nn

from mixpert_kernels import FusedMixpertTower

SIZE = KINDS["siglip"].size
some_kinds = pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu", "internvl_rms"])
both_ways = pytest.mark.parametrize("way", ["fused", "substituted"])


class Scaled(nn.Module):
    """Wraps a leaf, as an adapter does."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leaf(x) * 1.5


def both_results(tower: FusedMixpertTower, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = pixels(3, KINDS[kind].size)
    usual = run(tower, images, [2, 0, 2])
    return usual, run(substituted(tower), images, [2, 0, 2])


def places(tower: FusedMixpertTower) -> dict[str, nn.Module]:
    block, shared = tower.experts[0].block, tower._trunk_blocks[1]
    return {
        "expert leaf": block.mlp.fc1,
        "expert norm": block.layer_norm1,
        "expert attention": block.self_attn,
        "expert activation": block.mlp.activation_fn,
        "expert block": block,
        "trunk leaf": shared.self_attn.q_proj,
        "trunk mlp": shared.mlp,
        "trunk block": shared,
        "projector": tower.projector.block[1],
    }


@pytest.mark.parametrize("place", places(make("siglip")))
def test_hooked_modules_are_called(place: str) -> None:
    tower = make("siglip")
    before = run(tower, pixels(3, SIZE), [2, 0, 2])

    def scale(module: nn.Module, args: tuple, output: object) -> object:
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    places(tower)[place].register_forward_hook(scale)
    usual, own = both_results(tower, "siglip")
    assert_close(usual, own)
    assert error(usual, before) > 1e-4


@pytest.mark.parametrize(
    ("owner", "name"), [("experts.1.block.mlp", "fc2"), ("trunk.encoder.layers.0.self_attn", "v_proj")]
)  # fmt: skip
def test_wrapped_leaves_are_called(owner: str, name: str) -> None:
    tower = make("siglip")
    before = run(tower, pixels(3, SIZE), [2, 0, 2])
    holder = tower.get_submodule(owner)
    setattr(holder, name, Scaled(getattr(holder, name)))
    usual, own = both_results(tower, "siglip")
    assert_close(usual, own)
    assert error(usual, before) > 1e-3


def test_lora_in_the_trunk_is_applied() -> None:
    peft = pytest.importorskip("peft")
    tower = make("siglip")
    before = run(tower, pixels(3, SIZE), [2, 0, 2])
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False, r=2)
    peft.inject_adapter_in_model(config, tower.trunk)
    usual, own = both_results(tower.eval(), "siglip")
    assert_close(usual, own)
    assert error(usual, before) > 1e-3


def test_a_vision_model_with_lora_keeps_it_in_its_experts() -> None:
    peft = pytest.importorskip("peft")
    model = KINDS["siglip"].build()
    bare = plain("siglip", model, pixels(2, SIZE))
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False, r=2)
    peft.inject_adapter_in_model(config, model)
    want = plain("siglip", model.eval(), pixels(2, SIZE))
    assert error(want, bare) > 1e-3
    tower = FusedMixpertTower.from_vision_model(model, num_experts=2, expert_layers=3)
    assert_close(run(tower, pixels(2, SIZE), [1, 0]), want)


DROPOUT = {
    "siglip": {"attention_dropout": 0.5},
    "clip": {"attention_dropout": 0.5},
    "dinov2": {"drop_path_rate": 0.9},
    "dinov2_registers": {"attention_probs_dropout_prob": 0.5},
    "vit": {"hidden_dropout_prob": 0.5},
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_at_work_in_training(kind: str) -> None:
    model = KINDS[kind].build(**DROPOUT[kind])
    tower = FusedMixpertTower.from_vision_model(model, projector(), num_experts=EXPERTS)
    images, expert = pixels(4, KINDS[kind].size), torch.tensor([0, 1, 2, 1])
    still = run(tower, images, expert.tolist())

    def drawn(module: FusedMixpertTower) -> torch.Tensor:
        torch.manual_seed(5)
        return module.train()(images, expert=expert).last_hidden_state.detach()

    usual = drawn(tower)
    assert error(usual, still) > 1e-3
    x = tower.trunk_features(images).detach()
    torch.manual_seed(6)
    once = tower.expert_segment(x, routing(0, 1, 2, 1)).detach()
    again = tower.expert_segment(x, routing(0, 1, 2, 1)).detach()
    assert error(once, again) > 1e-3  # the experts drop too, not the trunk alone
    assert_close(usual, drawn(substituted(tower)))
    assert_close(run(tower.eval(), images, expert.tolist()), still)


def test_a_model_once_asked_for_hidden_states_still_runs_fused() -> None:
    """transformers leaves its capturing hooks on the blocks; they must not switch the fused plans off for good."""
    vision = KINDS["siglip"].build()
    vision(pixels(1, SIZE), output_hidden_states=True)
    assert any(block._forward_hooks for block in vision.encoder.layers)
    tower = FusedMixpertTower.from_vision_model(vision)
    for plan, block in zip(tower._trunk_plans, tower._trunk_blocks, strict=True):
        assert plan.serves(block, (None,))
    for expert in tower.experts:
        assert expert.plan.serves(expert.block, (None,))
