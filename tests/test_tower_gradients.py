"""Gradients: each expert gets its own, with and without gradient checkpointing."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from _towers import (
    KINDS,
    assert_close,
    error,
    grouped,
    make,
    pixels,
    reference_only,
    run,
    tower_of,
)
from torch.utils.checkpoint import checkpoint

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.modules import ExpertBlock

SIZE = KINDS["siglip"].size
some_kinds = pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu", "internvl_rms"])
both_ways = pytest.mark.parametrize("way", ["fused", "substituted"])


@pytest.mark.parametrize("kind", ["siglip", "dinov2_swiglu"])
def test_an_expert_gets_the_gradient_it_gets_alone(kind: str, monkeypatch) -> None:
    reference_only(monkeypatch)
    tower = make(kind).double()
    images, routes = pixels(4, KINDS[kind].size).double(), torch.tensor([1, 0, 1, 0])
    goal = torch.randn(tower(images).last_hidden_state.shape, generator=torch.manual_seed(1))

    def gradients(chosen: list[int]) -> dict[str, torch.Tensor]:
        tower.zero_grad()
        y = tower(images[chosen], expert=routes[chosen]).last_hidden_state
        (y * goal[chosen]).sum().backward()
        return {name: p.grad.clone() for name, p in grouped(tower).items()}

    mixed, alone = gradients([0, 1, 2, 3]), gradients([0, 2])
    for name, gradient in mixed.items():
        assert torch.allclose(gradient[1], alone[name][1], rtol=1e-9, atol=1e-12), name
        assert gradient[1].abs().max() > 0, name
        assert not gradient[2].any(), name  # an expert without images: exact zeros


def two_forwards_one_backward(tower: FusedMixpertTower) -> dict[str, torch.Tensor]:
    """Gradients of a loss over two batches with different routes."""
    size = KINDS[tower.kind].size
    tower.zero_grad()
    first = tower(pixels(3, size, 1), expert=torch.tensor([0, 1, 2])).last_hidden_state
    second = tower(pixels(3, size, 2), expert=torch.tensor([2, 2, 0])).last_hidden_state
    (first.square().sum() + 3 * second.square().sum()).backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu", "internvl", "beit"])
@pytest.mark.parametrize("how", ["flag", "reentrant", "outer"])
@both_ways
def test_gradient_checkpointing_keeps_each_forward_its_routes(kind, how, way, monkeypatch) -> None:
    tower = tower_of(kind, way).train()
    tower.kind = kind
    want = two_forwards_one_backward(tower)
    calls = []
    once = ExpertBlock._run
    monkeypatch.setattr(ExpertBlock, "_run", lambda *a, **k: calls.append(1) or once(*a, **k))
    two_forwards_one_backward(tower)
    without = len(calls)
    if how == "outer":  # a model around the tower sets the flag wherever it finds one
        for module in tower.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = functools.partial(
                    checkpoint, use_reentrant=False
                )
    else:
        options = {"use_reentrant": how == "reentrant"}
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    calls.clear()
    got = two_forwards_one_backward(tower)
    assert len(calls) > without  # blocks did run again
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-4), name
    tower.gradient_checkpointing_disable()
    calls.clear()
    two_forwards_one_backward(tower)
    assert len(calls) == without


def test_frozen_trunk_with_checkpointing_still_trains_experts() -> None:
    tower = make("siglip").train()
    tower.kind = "siglip"
    tower.trunk.requires_grad_(False)
    want = two_forwards_one_backward(tower)
    tower.gradient_checkpointing_enable()
    got = two_forwards_one_backward(tower)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-4), name


def test_inference_sees_every_update() -> None:
    tower = make("siglip")
    images = pixels(3, SIZE)
    old = run(tower, images, [0, 1, 2])
    state = copy.deepcopy(tower.state_dict())
    optimizer = torch.optim.SGD(tower.parameters(), lr=1e-3)
    tower(images, expert=torch.tensor([0, 1, 2])).last_hidden_state.square().mean().backward()
    optimizer.step()
    stepped = run(tower, images, [0, 1, 2])
    assert error(stepped, old) > 1e-4
    assert_close(stepped, run(copy.deepcopy(tower), images, [0, 1, 2]))
    tower.load_state_dict(state)
    assert_close(run(tower, images, [0, 1, 2]), old)
