"""torch.compile(tower, fullgraph=True): the same result, compiled once for all routings."""

from __future__ import annotations

import shutil

import _towers
import pytest
import torch
from _towers import EXPERTS, KINDS, assert_close, pixels, substituted

ROUTINGS = [
    [0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1], [2, 2, 1, 1], [0, 0, 0, 0],
    [1, 0, 2, 2], [2, 2, 2, 2], [0, 2, 0, 2], [1, 2, 1, 0], [2, 1, 0, 0],
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


def make(kind: str) -> torch.nn.Module:
    """One shared layer and one of experts: tracing takes its time."""
    return _towers.make(kind, layers=2, expert_layers=1)


def compiled(tower: torch.nn.Module, backend: str):
    return torch.compile(tower, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "aot_eager") for kind in ("siglip", "dinov2", "internvl", "dinov3")),
        pytest.param("siglip", "inductor", marks=needs_compiler),
        pytest.param("dinov2", "inductor", marks=needs_compiler),
        pytest.param("internvl", "inductor", marks=needs_compiler),
    ],
)
def test_one_graph_serves_ten_routings(kind: str, backend: str) -> None:
    tower = make(kind)
    images = pixels(4, KINDS[kind].size)
    fast = compiled(tower, backend)
    frames = torch._dynamo.utils.counters["stats"]
    seen = []
    with torch.no_grad():
        for routes in ROUTINGS:
            expert = torch.tensor(routes)
            got, want = fast(images, expert=expert), tower(images, expert=expert)
            assert_close(got.last_hidden_state, want.last_hidden_state)
            assert_close(got.router_scores, want.router_scores)
            assert got.expert.tolist() == routes
            seen.append(frames["unique_graphs"])
    assert seen == [1] * 10


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "internvl"])
def test_the_routers_own_routes_need_no_recompilation_either(kind: str) -> None:
    tower = make(kind)
    fast = compiled(tower, "eager")
    frames = torch._dynamo.utils.counters["stats"]
    routes = set()
    with torch.no_grad():
        for seed in range(10):
            images = pixels(4, KINDS[kind].size, seed)
            got, want = fast(images), tower(images)
            assert got.expert.tolist() == want.expert.tolist()
            routes.add(tuple(want.expert.tolist()))
            assert_close(got.last_hidden_state, want.last_hidden_state)
            assert frames["unique_graphs"] == 1
    assert len(routes) > 3


def test_leaf_substitution_compiles_like_the_plan() -> None:
    tower = make("siglip")
    images, expert = pixels(4, (30, 30)), torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        want = tower(images, expert=expert).last_hidden_state
        fast = compiled(substituted(tower), "aot_eager")
        assert_close(fast(images, expert=expert).last_hidden_state, want)


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "internvl"])
def test_gradients_are_those_of_eager(kind: str) -> None:
    tower = make(kind).train()
    images = pixels(4, KINDS[kind].size)
    fast = compiled(tower, "aot_eager")

    def gradients(call, routes: list[int]) -> dict[str, torch.Tensor]:
        tower.zero_grad()
        output = call(images, expert=torch.tensor(routes))
        loss = output.last_hidden_state.square().mean() + output.router_scores.square().sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    for routes in ROUTINGS[:3]:
        got, want = gradients(fast, routes), gradients(tower, routes)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-5), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_tiles_of_images_compile_when_the_base_tile_is_given() -> None:
    tower = make("siglip")
    tiles, image_of_tile = pixels(5, (30, 30)), torch.tensor([0, 0, 1, 1, 1])
    base_tile = torch.tensor([1, 4])
    fast = compiled(tower, "aot_eager")
    with torch.no_grad():
        want = tower(tiles, image_of_tile=image_of_tile, base_tile=base_tile)
        got = fast(tiles, image_of_tile=image_of_tile, base_tile=base_tile)
    assert got.expert.tolist() == want.expert.tolist()
    assert_close(got.last_hidden_state, want.last_hidden_state)


def test_updates_of_weights_reach_the_compiled_tower() -> None:
    tower = make("siglip")
    images, expert = pixels(4, (30, 30)), torch.tensor([2, 0, 1, 1])
    fast = compiled(tower, "aot_eager")
    with torch.no_grad():
        before = fast(images, expert=expert).last_hidden_state
        for block in tower.experts:
            for parameter in block.parameters():
                parameter[EXPERTS - 1].mul_(1.5)
        after = fast(images, expert=expert).last_hidden_state
        assert_close(after, tower(images, expert=expert).last_hidden_state)
    assert not torch.equal(after[0], before[0])
    assert_close(after[1:], before[1:])
