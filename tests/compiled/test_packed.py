"""Packed rows, compiled and emulated: every launch, tiles of no row, of one and of many, and no other tile's bits."""

from __future__ import annotations

import math

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends.reference import grouped_layer_norm as plain_norm
from mixpert_kernels.backends.reference import grouped_linear as plain_linear
from mixpert_kernels.backends.reference import route as plain_route
from mixpert_kernels.routing import counting_sort
from mixpert_kernels.testing import assert_as_accurate

from ._cases import DTYPES, EXPERTS, check, normal, to
from ._emulate import emulated
from ._worker import full
from .test_grouped_linear import CHIPS, PERSISTENT, path
from .test_route import HOSTILE, barriers, double
from .test_route import problem as router

LENGTHS = (
    5,
    0,
    130,
    1,
    0,
    66,
)  # blocks of a GEMM have 128 rows, chunks of sums 64 or 32, of a pool 32
EXPERT = (2, 0, 2, 0, 2, 1)  # expert 3 has no tile, expert 0 one of no row and one of one
ROUTER = (1e-5, "score_difference", 0.1, "runner_up")
NAN = math.nan


def ours(name):
    """A module of the backend, which a worker may import and this process may not."""
    import importlib

    return importlib.import_module(f"mixpert_kernels.backends.triton.{name}")


def begins(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ids(lengths=LENGTHS, expert=EXPERT):
    """expert, order, offsets, cu_seqlens."""
    return *Routing.forced(torch.tensor(expert), EXPERTS)[:3], begins(lengths)


def linear(depth, width, *, count=1, activation="none", extras=False):
    """Arguments of the forward host function."""
    rows, columns = sum(LENGTHS), count * width
    weights = [normal(EXPERTS, width, depth, seed=i) * depth**-0.5 for i in range(count)]
    biases = [normal(EXPERTS, width, seed=10 + i) for i in range(count)]
    added = normal(rows, columns, seed=20) if extras else None
    scale = normal(EXPERTS, columns, seed=21) if extras else None
    return [normal(rows, depth, seed=22), weights, biases, *ids(), activation, added, scale, True]


def backward(depth, width, *, count=1, activation="none", scale=False):
    """Arguments of the backward host function."""
    x, weights, biases, *routing, _, _, _, _ = linear(depth, width, count=count)
    rows, columns = sum(LENGTHS), count * width
    factor = normal(EXPERTS, columns, seed=21) if scale else None
    stored = activation != "none" or scale
    pre = normal(rows, columns, seed=24) if stored else torch.empty(0)
    dy, needs = normal(rows, columns, seed=23), [True, True, True, scale]
    return [dy, x, weights, biases, pre, *routing, activation, factor, needs]


def run_on(arch, tma, function="grouped_linear", **options):
    def run(seed, *args):
        with path(tma), emulated(arch, seed=seed, **options) as launches:
            results = getattr(ours("grouped_linear"), function)(*args)
        for kernel, stats in launches:
            described = tma and kernel in ("_grouped_linear_kernel", "_linear_dx_kernel")
            assert (stats.tma_load_bytes > 0) == described, (kernel, stats)
        return results

    return run


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=full) for d in DTYPES[1:])])
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_linear(arch, tma, dtype):
    tma = tma and dtype != torch.float32
    args = linear(72, 40, count=2, activation="gelu", extras=True)
    check(run_on(arch, tma), plain_linear.grouped_linear, args, dtype)


def test_linear_on_a_persistent_grid():
    """Two programs share the blocks of rows, the empty ones too."""
    args = linear(72, 136)
    run = run_on(90, True, row=PERSISTENT, multiprocessors=2)
    check(run, plain_linear.grouped_linear, args, torch.bfloat16)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=full) for d in DTYPES[1:])])
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_linear_backward(arch, tma, dtype):
    tma = tma and dtype != torch.float32
    args = backward(72, 64, count=2, activation="gelu_tanh", scale=True)
    run = run_on(arch, tma, "grouped_linear_backward")
    check(run, plain_linear.grouped_linear_backward, args, dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [72, 73, pytest.param(1280, marks=full)])
def test_layer_norm(width, arch):
    rows, table = (sum(LENGTHS), width), (EXPERTS, width)
    args = [normal(*shape, seed=i) for i, shape in enumerate((rows, rows, table, table))]

    def run(backend, dy, x, weight, bias):
        y, mean, rstd = backend.grouped_layer_norm(x, weight, bias, *ids(), 1e-6)
        return y, backend.grouped_layer_norm_backward(dy, x, weight, bias, mean, rstd, *ids())

    def emulate(seed, *args):
        with emulated(arch, seed=seed):
            return run(ours("grouped_layer_norm"), *args)

    check(emulate, lambda *args: run(plain_norm, *args), args, torch.bfloat16)


TILES = [0, 0, 1, 1, 1, 2], [0, 2, 5]  # image_of_tile, base_tile


def route(backend, x, weights, tiles=(None, None), lengths=LENGTHS):
    tiles = [None if t is None else torch.tensor(t) for t in tiles]
    return backend.route(x, begins(lengths), *tiles, None, *weights, *ROUTER)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("hidden", [None, 40])
def test_route_and_its_backward(arch, hidden):
    _, weights = router(1, 72, EXPERTS, hidden, torch.bfloat16)
    x, *others = (normal(sum(LENGTHS), 72, seed=seed).bfloat16() for seed in range(5))
    with emulated(arch, resident_ctas=3) as launches:
        got = route(ours("route"), x, weights, TILES)
    assert len(launches) == 1 and barriers(launches[0].stats.compiled.ptx) == [True, True]
    wanted = route(plain_route, x, weights, TILES)
    truth = route(plain_route, x.double(), double(weights), TILES)
    draws = []  # for a few images have a few scores
    for other in others:
        usual = route(plain_route, other, weights, TILES)[:2]
        exact = route(plain_route, other.double(), double(weights), TILES)[:2]
        draws.append(list(zip(usual, exact, strict=True)))
    for name, *tensors, more in zip(
        ("scores", "pooled"), got, wanted, truth, zip(*draws, strict=True), strict=False
    ):
        assert_as_accurate(name, *tensors, draws=more)
    chosen = plain_route.decide(got[0], *ROUTER[1:])[torch.tensor(TILES[0])]
    for found, sorted_ids in zip(got[2:], counting_sort(chosen, EXPERTS), strict=True):
        assert torch.equal(found, sorted_ids), (found, sorted_ids)

    def gradients(backend, x, weights, scores, pooled):
        given = (normal(*t.shape, seed=3).to(scores.dtype) for t in (scores, pooled))
        rest = (torch.tensor(TILES[1]), *weights[:5], scores, pooled, 1e-5, True)
        return backend.route_backward(*given, x, begins(LENGTHS), *rest)

    with emulated(arch, resident_ctas=3) as launches:
        got = gradients(ours("route"), x, weights, *wanted[:2])
    assert len(launches) == 3, "three launches"
    wide = [None if w is None else w.float() for w in weights]
    usual = gradients(plain_route, x.float(), wide, *wanted[:2])
    exact = gradients(plain_route, x.double(), double(weights), *truth[:2])
    for i, (g, w, t) in enumerate(zip(got, usual, exact, strict=True)):
        assert_as_accurate(f"gradient {i}", g, w.to(g.dtype), t)
    tiles = got[0].split(LENGTHS)
    assert not tiles[3].any() and tiles[2].any(), "only base tiles have a gradient"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tiles", [(None, None), TILES], ids=["tiles", "images"])
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 12), marks=full)], ids=str)
def test_route_under_hostile_schedules(arch, tiles, seeds):
    """An image whose base tile has no row is scored as well, not finite, and served by expert 0."""
    lengths = (33, 0, 1, 40, 0, 5)
    x, weights = normal(sum(lengths), 24).half(), router(1, 24, 3, 6, torch.float16)[1]
    wanted = []
    for seed in seeds:
        with emulated(arch, seed=seed, resident_ctas=2 + seed, **HOSTILE):
            got = route(ours("route"), x, weights, tiles, lengths)
        wanted = wanted or got
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"seed {seed}"
    if tiles[0] is None:
        empty = torch.tensor([1, 4])
        assert got[0][empty].isnan().all() and not got[2][empty].any()
        assert got[0][[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_a_tile_is_the_same_alone_in_any_order_and_beside_nan(arch, tma):
    """Alone it is a tile (1, T, D); beside rows that are not finite its expert's gradients keep their bits, too."""
    x, weights, *_ = to(torch.bfloat16, linear(72, 64))
    dy, pre = (normal(sum(LENGTHS), 64, seed=i).bfloat16() for i in (1, 2))
    gain = [normal(EXPERTS, 72, seed=i).bfloat16() for i in (3, 4)]

    def run(x, dy, pre, routing, seed):
        with path(tma), emulated(arch, seed=seed, resident_ctas=1 + seed):
            y, mean, rstd = ours("grouped_layer_norm").grouped_layer_norm(x, *gain, *routing, 1e-6)
            layer = ours("grouped_linear")
            z, _ = layer.grouped_linear(y, weights, [], *routing, "gelu", None, None, False)
            rest = (weights, [], pre, *routing, "gelu", None, [True, True, False, False])
            dx, (dw,), _, _ = layer.grouped_linear_backward(dy, y, *rest)
            backward = ours("grouped_layer_norm").grouped_layer_norm_backward
            return [y, z, dx], [dw, *backward(dx, x, *gain, mean, rstd, *routing)[1:]]

    whole, sums = run(x, dy, pre, ids(), 0)
    split = [
        list(zip(*(t.split(LENGTHS) for t in (x, dy, pre)), strict=True)),
        [t.split(LENGTHS) for t in whole],
    ]
    order = [5, 2, 4, 0, 1, 3]
    mixed = [torch.cat([split[0][b][i] for b in order]) for i in range(3)]
    lengths = [LENGTHS[b] for b in order]
    moved, _ = run(*mixed, ids(lengths, [EXPERT[b] for b in order]), 1)
    for got, tiles in zip(moved, split[1], strict=True):
        for tile, b in zip(got.split(lengths), order, strict=True):
            assert torch.equal(tile, tiles[b]), f"tile {b} moved"
    for b in (0, 3, 5):
        forced = Routing.forced(torch.tensor(EXPERT[b : b + 1]), EXPERTS)[:3]
        alone, own = run(*(t[None] for t in split[0][b]), (*forced, None), 2)
        for got, tiles in zip(alone, split[1], strict=True):
            assert torch.equal(got[0], tiles[b]), f"tile {b} alone"
    assert torch.equal(own[0][1], sums[0][1]), "dW of expert 1, from its one tile"
    spoilt = [[t.clone() for t in tensors] for tensors in split[0]]
    for b in (2, 3):
        for tensor in spoilt[b]:
            tensor[:] = NAN
    beside, spoilt_sums = run(*(torch.cat(list(t)) for t in zip(*spoilt, strict=True)), ids(), 1)
    for got, wanted in zip(beside, split[1], strict=True):
        for b in (0, 1, 4, 5):
            assert torch.equal(got.split(LENGTHS)[b], wanted[b]), f"tile {b} beside nan"
    for got, wanted in zip(spoilt_sums, sums, strict=True):
        assert torch.equal(got[[1, 3]], wanted[[1, 3]]), "expert 1 beside nan"
        assert not got[3].any(), "expert 3 has no tile"
