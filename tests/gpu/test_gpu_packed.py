"""Packed rows on a GPU: a tile's numbers are bit for bit those of that tile in a batch of its own; nothing waits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from _on_gpu import DEVICE, EXPERTS, backend, compiled_variants, every_dtype, no_sync
from torch import Tensor

from mixpert_kernels import Routing, backends, ops
from mixpert_kernels.testing import assert_as_accurate

__all__ = ["backend", "no_sync"]  # fixtures
pytestmark = pytest.mark.gpu

K, H = 72, 136
LENGTHS = (5, 0, 300, 1, 0, 129)
EXPERT = (2, 0, 2, 0, 2, 0)  # expert 1 has no tile
SHAPES = {
    "gain": (EXPERTS, K), "offset": (EXPERTS, K),
    "q": (EXPERTS, K, K), "k": (EXPERTS, K, K), "v": (EXPERTS, K, K), "out": (EXPERTS, K, 3 * K),
    "weight1": (EXPERTS, H, K), "bias1": (EXPERTS, H), "weight2": (EXPERTS, K, H), "bias2": (EXPERTS, K),
    "router_norm_weight": (K,), "router_norm_bias": (K,), "router_weight": (EXPERTS, K), "router_bias": (EXPERTS,),
}  # fmt: skip


@pytest.fixture(autouse=True)
def packed(backend: str) -> None:
    for op in ("route", "grouped_layer_norm", "grouped_linear", "grouped_mlp"):
        place = {"device": DEVICE, "dtype": torch.bfloat16, "packed": True}
        if reason := backends.why_not(op, backend, **place):
            pytest.skip(f"{backend}: {reason}")


def begins(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def problem(rows: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 1.0
        values = torch.randn(shape, generator=generator) * scale
        return values.to(DEVICE, dtype).requires_grad_()

    return {name: new(*shape) for name, shape in SHAPES.items()} | {"x": new(rows, K)}


def layer(p: dict[str, Tensor], routing: Routing, backend: str) -> Tensor:
    options = {"backend": backend}
    h = ops.grouped_layer_norm(p["x"], p["gain"], p["offset"], routing, **options)
    qkv = ops.grouped_linear(h, [p["q"], p["k"], p["v"]], None, routing, **options)
    x = ops.grouped_linear(qkv, p["out"], None, routing, residual=p["x"], **options)
    weights = (p["weight1"], p["bias1"], p["weight2"], p["bias2"])
    return ops.grouped_mlp(x, *weights, routing, activation="gelu_tanh", residual=x, **options)


def route(p: dict[str, Tensor], cu_seqlens: Tensor, backend: str) -> Routing:
    names = ("router_norm_weight", "router_norm_bias", "router_weight", "router_bias")
    norm_weight, norm_bias, weight, bias = (p[name] for name in names)
    router = ops.RouterWeights(norm_weight, norm_bias, None, None, weight, bias)
    strategy = ops.Strategy("direct")
    return ops.route(p["x"], router, strategy, cu_seqlens=cu_seqlens, backend=backend)


def forced(expert: Sequence[int], lengths: Sequence[int]) -> Routing:
    ids = torch.tensor(expert, device=DEVICE)
    return Routing.forced(ids, EXPERTS, cu_seqlens=begins(lengths))


def results(p: dict[str, Tensor], routing: Routing, backend: str) -> dict[str, Tensor]:
    """y and the gradients of a random linear function of it."""
    y = layer(p, routing, backend)
    leaves = {name: t for name, t in p.items() if not name.startswith("router")}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@every_dtype
def test_a_layer_is_as_accurate_as_plain_pytorch(dtype: torch.dtype, backend: str) -> None:
    p, routing = problem(sum(LENGTHS), dtype), forced(EXPERT, LENGTHS)
    got, plain = (results(p, routing, name) for name in (backend, "reference"))
    wide = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    truth = results(wide, routing, "reference")
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, plain[name], truth[name])
        if name not in ("y", "dx"):
            assert not tensor[1].any(), f"{name} of an expert without tiles"


@every_dtype
def test_scores_are_as_accurate_as_plain_pytorch(dtype: torch.dtype, backend: str) -> None:
    lengths = [n or 2 for n in LENGTHS]
    p, cu = problem(sum(lengths), dtype), begins(lengths)
    wide = {name: t.detach().double() for name, t in p.items()}

    def scores(p: dict[str, Tensor], name: str) -> Tensor:
        return route(p, cu, name).scores.detach()

    truth = scores(wide, "reference")
    assert_as_accurate("scores", scores(p, backend), scores(p, "reference"), truth)


@every_dtype
@torch.no_grad()
def test_a_tile_is_bitwise_the_same_alone_and_in_any_order(
    dtype: torch.dtype, backend: str
) -> None:
    p = problem(sum(LENGTHS), dtype)
    tiles, order = p["x"].split(LENGTHS), (5, 2, 4, 0, 1, 3)

    def run(chosen: Sequence[int]) -> dict[int, Tensor]:
        lengths = [LENGTHS[b] for b in chosen]
        some = p | {"x": torch.cat([tiles[b] for b in chosen])}
        y = layer(some, forced([EXPERT[b] for b in chosen], lengths), backend)
        scores = route(some, begins(lengths), backend).scores
        rows = y.split(lengths)
        return {b: (rows[i], scores[i].nan_to_num(7.0)) for i, b in enumerate(chosen)}

    whole = run(range(6))
    for chosen in (order, (0,), (2,), (3,), (5,)):
        for b, found in run(chosen).items():
            for got, want in zip(found, whole[b], strict=True):
                assert torch.equal(got, want), (chosen, b)


def step(p: dict[str, Tensor], cu_seqlens: Tensor, backend: str) -> list[Tensor]:
    """A layer as it is routed, forward and backward."""
    routing = route(p, cu_seqlens, backend)
    loss = layer(p, routing, backend).float().square().mean() + routing.scores.square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(p.values()))]


def test_nothing_waits(backend: str, request) -> None:
    p, cu = problem(sum(LENGTHS), torch.bfloat16), begins(LENGTHS)
    step(p, cu, backend)
    request.getfixturevalue("no_sync")
    step(p, cu, backend)


@torch.no_grad()
def test_a_graph_serves_every_routing_and_every_division_of_its_rows(backend: str) -> None:
    rows = 435
    p, cu = problem(rows, torch.bfloat16), begins((rows, 0, 0, 0, 0, 0))

    def forward() -> Tensor:
        return layer(p, route(p, cu, backend), backend)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what has to compile does so before
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = forward()
    for lengths in (LENGTHS, (435, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 430), (0, 128, 0, 128, 179, 0)):
        for seed in (1, 2):
            p["x"].copy_(problem(rows, torch.bfloat16, seed)["x"])
            cu.copy_(begins(lengths))
            graph.replay()
            assert torch.equal(y, forward()), lengths


def test_no_tiles_and_no_rows_compile_anything(backend: str) -> None:
    if backend != "triton":
        pytest.skip(f"{backend} compiles nothing")
    draw = random.Random(0)
    p = problem(1000, torch.bfloat16)
    step(p, begins((400, 600)), backend)
    count = compiled_variants()
    assert count > 0
    for _ in range(12):
        lengths = [draw.choice((0, 1, 16, 17, 300)) for _ in range(draw.randint(1, 40))]
        lengths[0] += 1
        x = torch.randn(sum(lengths), K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        step(p | {"x": x}, begins(lengths), backend)
        assert compiled_variants() == count, lengths
