"""What experts add to a vision-language model, and how its trunk runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _mllms import EXPERTS, KINDS, LAYERS, VISION
from test_mllm_parity import assert_close, mixed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixpert_kernels.hf.mllm import added_cost, mixpertize
from mixpert_kernels.hf.mllm.blocks import TrunkLayer
from mixpert_kernels.modules.by_expert import by_expert
from mixpert_kernels.modules.prenorm import PreNormPlan
from mixpert_kernels.routing import Routing

families = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def products(x: torch.Size, weights: list[torch.Size]) -> int:
    rows = x.numel() // x[-1]
    return 2 * rows * sum(weight[-2] * weight[-1] for weight in weights)


MIXPERT = {  # arguments come as their shapes
    torch.ops.mixpert.grouped_linear: lambda x, weights, *_, **__: products(x, weights),
    torch.ops.mixpert.norm_grouped_linear: lambda x, gain, offset, eps, weights, *_, **__: products(
        x, weights
    ),
    torch.ops.mixpert.grouped_mlp: lambda x, first, bias, second, *_, **__: products(
        x, [first, second[:-2] + first[-2:]]
    ),
}


def flop(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping=MIXPERT) as counter:
        model(**inputs)
    return counter.get_total_flops()


@families
def test_the_experts_add_no_arithmetic(family):
    """Counted by PyTorch for the plain model, by the rule above for our ops."""
    kind = KINDS[family]
    inputs = kind.call(kind.prompts["batch"])
    assert flop(mixed(kind), inputs) == flop(kind.build(), inputs) > 0


@families
def test_added_parameters(family):
    kind = KINDS[family]
    plain = sum(p.numel() for p in kind.build().parameters())
    for options in ({}, {"router_hidden": 8}, {"expert_layers": 1}):
        model = mixpertize(kind.build(), EXPERTS, **options)
        cost = added_cost(model)
        assert cost.parameters == sum(p.numel() for p in model.parameters()) - plain
        assert cost.share == cost.parameters / plain


def test_added_arithmetic_is_the_routers():
    """By hand: a mean over tokens of 16 features, and 16 x 3 products."""
    width = VISION["hidden_size"]
    cost = added_cost(mixpertize(KINDS["llava"].build(), EXPERTS))
    assert (cost.flop, cost.flop_per_token) == (2 * width * EXPERTS, width)
    cost = added_cost(mixpertize(KINDS["llava"].build(), EXPERTS, router_hidden=8))
    assert (cost.flop, cost.flop_per_token) == (2 * (width * 8 + 8 * EXPERTS), width)


def test_a_plain_model_has_no_added_cost():
    with pytest.raises(ValueError, match="added_cost: model must be a mixpertized model"):
        added_cost(KINDS["llava"].build())


# The trunk.


ROTARY = ("qwen2_vl", "qwen2_5_vl")


def trunk(model: nn.Module) -> list[TrunkLayer]:
    return [module for module in model.modules() if isinstance(module, TrunkLayer)]


@pytest.fixture
def plans(monkeypatch) -> list[nn.Module]:
    """The blocks that a plan runs, in order."""
    ran, run = [], PreNormPlan.run

    def noted(self: PreNormPlan, block: nn.Module, x: Tensor, routing: Routing) -> Tensor:
        ran.append(block)
        return run(self, block, x, routing)

    monkeypatch.setattr(PreNormPlan, "run", noted)
    return ran


@families
def test_every_block_runs_by_its_plan(family, plans):
    if family in ROTARY:
        pytest.skip("its attention has rotary embeddings: no plan")
    kind = KINDS[family]
    model = mixed(kind)
    model(**kind.call(kind.prompts["batch"]))
    assert len(trunk(model)) == LAYERS - 2
    assert len(plans) == len(set(map(id, plans))) == LAYERS
    assert all(block in plans for block in trunk(model))


STEPS_ASIDE: dict[str, Callable[[nn.Module], Any]] = {
    "a hook": lambda block: block.mlp.register_forward_hook(lambda *_: None),
    "a leaf of another class": lambda block: setattr(block.mlp, "fc1", Another(block.mlp.fc1)),
    "eager attention": lambda block: setattr(
        block.self_attn.config, "_attn_implementation", "eager"
    ),
}


class Another(nn.Module):
    """As LoRA's: a leaf around a leaf."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(x) + 1.0


@pytest.mark.parametrize("why", STEPS_ASIDE)
def test_a_changed_block_runs_its_own_forward(why, plans):
    kind = KINDS["llava"]
    plain, model = kind.build(), mixed(kind)
    inputs = kind.call(kind.prompts["batch"])
    block = trunk(model)[0]
    for changed in (block, plain.model.vision_tower.encoder.layers[0]):
        STEPS_ASIDE[why](changed)
    assert_close(model(**inputs).logits, plain(**inputs).logits)
    assert block not in plans


@torch.enable_grad()
def test_where_gradients_are_needed_the_trunk_is_its_own(plans):
    kind = KINDS["llava"]
    model, inputs = mixed(kind), kind.call(kind.prompts["batch"])
    model(**inputs)
    assert not any(block in plans for block in trunk(model))
    for block in trunk(model):
        block.requires_grad_(False)
    model.model.vision_tower.embeddings.requires_grad_(False)
    model.model.vision_tower.pre_layrnorm.requires_grad_(False)
    model(**inputs)
    assert trunk(model)[0] in plans  # frozen, it needs none


def test_autocast_reaches_the_trunk(plans):
    kind = KINDS["llava"]
    model, inputs = mixed(kind), kind.call(kind.prompts["batch"])
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert not any(block in plans for block in trunk(model))


def test_hidden_states_and_attentions_are_the_plain_models():
    kind = KINDS["llava"]
    plain, model = kind.build(), mixed(kind)
    pixels = kind.call(kind.prompts["batch"])["pixel_values"]
    for attention in ("sdpa", "eager"):
        found = []
        for tower in (plain.model.vision_tower, model.model.vision_tower):
            tower.set_attn_implementation(attention)
            found.append(tower(pixels, output_hidden_states=True, output_attentions=True))
        wanted, got = found
        for name in ("hidden_states", "attentions"):
            assert len(got[name] or ()) == len(wanted[name] or ())
            for pair in zip(got[name] or (), wanted[name] or (), strict=True):
                assert_close(*pair)
    assert len(got.attentions) == LAYERS


def test_tiles_are_sorted_by_expert_meanwhile():
    x = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    seen = []

    def run(x: Tensor, routing: Routing) -> Tensor:
        seen.append((routing.expert.tolist(), routing.order.tolist(), x[:, 0, 0].tolist()))
        return x * 10 + routing.expert[:, None, None]

    routing = Routing.forced(torch.tensor([2, 0, 1, 0, 2]), 3)
    y = by_expert(run, x, routing)
    assert seen == [([0, 0, 1, 2, 2], [0, 1, 2, 3, 4], [1, 3, 2, 0, 4])]
    assert y[:, 0, 0].tolist() == [2, 10, 21, 30, 42]
    by_expert(run, x, Routing.forced(torch.tensor([0, 0, 1, 2, 2]), 3))
    assert seen[1][2] == [0, 1, 2, 3, 4]


def test_packed_rows_are_not_sorted():
    x, cu_seqlens = torch.ones(5, 3), torch.tensor([0, 2, 5], dtype=torch.int32)
    routing = Routing.forced(torch.tensor([1, 0]), 2, cu_seqlens=cu_seqlens)
    assert by_expert(lambda x, routing: x, x, routing) is x
