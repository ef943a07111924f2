"""Packed rows in csrc/cuda, emulated: a tile's numbers are bit for bit those of the same tile in a batch of its own.

Tiles of one size are what the other files test; here they are the truth, and lengths are odd, short and none.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from mixpert_kernels import Routing
from mixpert_kernels.backends.cuda import grouped_layer_norm as norm
from mixpert_kernels.backends.cuda import grouped_linear as linear
from mixpert_kernels.backends.cuda import grouped_mlp as mlp
from mixpert_kernels.backends.cuda import norm_grouped_linear as norm_linear
from mixpert_kernels.backends.cuda import route, route_grouped_linear
from mixpert_kernels.backends.cuda.grouped_outer import grouped_outer
from mixpert_kernels.backends.reference import grouped_linear as plain_linear
from mixpert_kernels.testing import assert_as_accurate

from ._cases import EXPERTS, normal, to
from ._emulate_cuda import emulated
from ._worker import full

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# No block of 128 rows is whole; the second tile has a slot too many, the third and the last have none; two of expert 2.
LENGTHS, EXPERT = (120, 20, 0, 1, 131, 0), (2, 0, 3, 2, 0, 1)


class Batch:
    """Packed tiles, and each of them alone."""

    def __init__(self, lengths=LENGTHS, expert=EXPERT) -> None:
        self.lengths, self.expert = list(lengths), list(expert)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.ids = Routing.forced(torch.tensor(expert), EXPERTS, cu_seqlens=self.cu_seqlens).ids
        self.rows = int(self.cu_seqlens[-1])

    def tiles(self, t: Tensor) -> list[Tensor]:
        return list(t.split(self.lengths))

    def alone(self, tile: int) -> tuple[Tensor | None, ...]:
        """The routing of one tile as (1, T, D)."""
        return Routing.forced(torch.tensor([self.expert[tile]]), EXPERTS).ids

    def chosen(self, tiles: list[int]) -> Batch:
        return Batch([self.lengths[b] for b in tiles], [self.expert[b] for b in tiles])

    def of(self, tiles: list[int], t: Tensor) -> Tensor:
        """The rows of these tiles."""
        return torch.cat([self.tiles(t)[b] for b in tiles])


def equal(name: str, got: Tensor, wanted: Tensor) -> None:
    same = torch.equal(got.nan_to_num(7.0, 8.0, 9.0), wanted.nan_to_num(7.0, 8.0, 9.0))
    assert same and got.shape == wanted.shape, name


# grouped_linear.


def layer(batch: Batch, depth: int, width: int, count: int, activation: str, dtype: torch.dtype):
    """Weights, biases, scale; x, residual."""
    weights = [normal(EXPERTS, width, depth, seed=i) * depth**-0.5 for i in range(count)]
    biases = [normal(EXPERTS, width, seed=10 + i) for i in range(count)]
    scale = normal(EXPERTS, count * width, seed=21)
    x, residual = normal(batch.rows, depth, seed=22), normal(batch.rows, count * width, seed=20)
    return to(dtype, [weights, biases, scale, x, residual])


CHOICES = [
    (80, "large", BF16),
    (80, "small", FP16),
    (80, "small", FP32),
    (90, "wgmma", BF16),
    pytest.param(80, "large", FP32, marks=full),
    pytest.param(90, "large", FP16, marks=full),
    pytest.param(90, "wgmma", FP16, marks=full),
]


@pytest.mark.parametrize("arch, choice, dtype", CHOICES, ids=str)
def test_linear_is_that_of_each_tile_alone(arch, choice, dtype):
    """The tiles alone by small blocks, whose bits are those of large ones; by wgmma where that serves."""
    batch = Batch()
    weights, biases, scale, x, residual = layer(batch, 72, 40, 3, "gelu", dtype)

    def run(x, residual, ids, choose, seed):
        with emulated(arch, choose=choose, seed=seed, multiprocessors=1 + seed % 3) as launches:
            made = linear.grouped_linear(x, weights, biases, *ids, "gelu", residual, scale, True)
        (launch,) = launches
        assert choose in launch.kernel and launch.stats.bank_conflicts == 0, launch
        return made

    y, pre = run(x, residual, batch.ids, choice, 0)
    own = "wgmma" if choice == "wgmma" else "small"
    for b, (one, added) in enumerate(zip(batch.tiles(x), batch.tiles(residual), strict=True)):
        if len(one):
            alone = run(one[None], added[None], batch.alone(b), own, b)
            equal(f"y of tile {b}", batch.tiles(y)[b], alone[0][0])
            equal(f"pre of tile {b}", batch.tiles(pre)[b], alone[1][0])
    for seed in (1, 2):
        for again, first in zip(run(x, residual, batch.ids, choice, seed), (y, pre), strict=True):
            equal(f"seed {seed}", again, first)
    order = [4, 5, 3, 0]
    other = run(batch.of(order, x), batch.of(order, residual), batch.chosen(order).ids, choice, 1)
    equal("permuted", other[0], batch.of(order, y))


def test_what_lies_in_other_tiles_shows_nowhere():
    """NaN before and after a tile: neither what is read of a neighbour's rows nor what is written past a tile's end."""
    batch = Batch((20, 33, 7), (1, 2, 3))
    weights, biases, _, x, _ = layer(batch, 64, 64, 1, "none", BF16)
    dz = to(BF16, normal(batch.rows, 64, seed=1))
    spoilt_x, spoilt_dz = x.clone(), dz.clone()
    for t in (spoilt_x, spoilt_dz):
        t[:20], t[53:] = float("nan"), float("inf")
    for arch, choice in ((80, "large"), (80, "small"), (90, "wgmma")):
        with emulated(arch, choose=choice):
            clean, got = (
                linear.grouped_linear(t, weights, biases, *batch.ids, "none", None, None, False)[0]
                for t in (x, spoilt_x)
            )
        equal(f"{choice}: y", batch.tiles(got)[1], batch.tiles(clean)[1])
        assert not got[53:].isfinite().any() and not got[:20].isfinite().any()
        if choice == "wgmma":
            continue
        with emulated(arch, choose=choice):
            (clean,), (got,) = (
                grouped_outer(*t, [64], *batch.ids[1:3], EXPERTS, FP32, cu_seqlens=batch.cu_seqlens)
                for t in ((dz, x), (spoilt_dz, spoilt_x))
            )
        equal(f"{choice}: dW", got[[0, 2]], clean[[0, 2]])
        assert not got[[1, 3]].isfinite().any()


def test_slots_without_rows_multiply_nothing():
    batch = Batch((128, 0, 128, 128, 0), (2, 1, 0, 2, 3))
    weights, *_, x, _ = layer(batch, 128, 128, 1, "none", BF16)
    for arch, choice in ((80, "large"), (80, "small"), (90, "wgmma")):
        with emulated(arch, choose=choice) as launches:
            linear.grouped_linear(x, weights, [], *batch.ids, "none", None, None, False)
            if choice != "wgmma":
                linear.grouped_linear_backward(
                    x.flip(1), x, weights, [], x.new_empty(0), *batch.ids, "none", None, [True, False, False, False]
                )  # fmt: skip
        for kernel, stats in launches:
            assert stats.mma_flops == 3 * 2 * 128**3, (kernel, stats.mma_flops)


def backward_problem(batch: Batch, depth: int, width: int, count: int, dtype: torch.dtype):
    weights, biases, scale, x, dy = layer(batch, depth, width, count, "gelu_tanh", dtype)
    return dy, x, weights, biases, to(dtype, normal(batch.rows, count * width, seed=24)), scale


@pytest.mark.parametrize(
    "choice, dtype, width",
    [
        ("large", BF16, 64),  # read weight by weight
        ("small", FP16, 72),  # side by side
        ("small", FP32, 5),  # rows off 16 bytes
        pytest.param("large", FP32, 40, marks=full),
        pytest.param("small", BF16, 64, marks=full),
    ],
    ids=str,
)
def test_linear_backward(choice, dtype, width):
    batch = Batch()
    dy, x, weights, biases, pre, scale = backward_problem(batch, 40, width, 2, dtype)
    needs = [True] * 4

    def run(dy, x, pre, ids, seed, choose=choice):
        with emulated(choose=choose, seed=seed) as launches:
            grads = linear.grouped_linear_backward(
                dy, x, weights, biases, pre, *ids, "gelu_tanh", scale, needs
            )
        assert len(launches) == 4, launches
        return grads

    grads = run(dy, x, pre, batch.ids, 0)
    dx, dweights, dbiases, dscale = grads
    by_expert = [*dweights, *dbiases, dscale]
    for b in (0, 1, 3, 4):
        rows = (t[None] for t in (batch.tiles(t)[b] for t in (dy, x, pre)))
        own_dx, own_dweights, own_dbiases, own_dscale = run(*rows, batch.alone(b), b, "small")
        equal(f"dx of tile {b}", batch.tiles(dx)[b], own_dx[0])
        if batch.expert.count(e := batch.expert[b]) == 1:
            own = [*own_dweights, *own_dbiases, own_dscale]
            for i, (got, wanted) in enumerate(zip(by_expert, own, strict=True)):
                equal(f"gradient {i} of expert {e}", got[e], wanted[e])
    assert not any(t[[1, 3]].any() for t in by_expert), "experts of no row"
    # Expert 2 alone, whose tiles then begin elsewhere; all tiles in another order.
    for tiles in ([0, 3], [2, 4, 1, 0, 3]):
        rows = (batch.of(tiles, t) for t in (dy, x, pre))
        some = run(*rows, batch.chosen(tiles).ids, 1)
        equal("dx", some[0], batch.of(tiles, dx))
        for got, wanted in zip([*some[1], *some[2], some[3]], by_expert, strict=True):
            equal(f"expert 2 of {tiles}", got[2], wanted[2])
    plain, truth = (
        plain_linear.grouped_linear_backward(
            *to(d, [dy, x, weights, biases, pre]), *batch.ids, "gelu_tanh", scale.to(d), needs
        )
        for d in (dtype, torch.float64)
    )
    for name, got, usual, exact in zip(("dx", "dW", "db", "ds"), grads, plain, truth, strict=True):
        got, usual, exact = ([t] if isinstance(t, Tensor) else t for t in (got, usual, exact))
        for one, two, three in zip(got, usual, exact, strict=True):
            assert_as_accurate(name, one, two, three)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_mlp(activation):
    """Both layers and their backward, tile by tile."""
    batch = Batch((0, 70, 1), (3, 2, 0))
    (weight1,), (bias1,), _, x, _ = layer(batch, 40, 72, 1, activation, BF16)
    (weight2,), (bias2,), scale, _, residual = layer(batch, 72, 24, 1, activation, BF16)
    dy, layers = residual.flip(0), (weight1, bias1, weight2, bias2)

    def run(x, residual, dy, ids):
        with emulated(seed=len(x)):
            y, pre1, pre2 = mlp.grouped_mlp(x, *layers, *ids, activation, residual, scale, True)
            grads = mlp.grouped_mlp_backward(
                dy, x, *layers, pre1, pre2, *ids, activation, scale, [True] * 6
            )
        return y, *grads

    y, dx, *by_expert = run(x, residual, dy, batch.ids)
    for b, e in ((1, 2), (2, 0)):
        rows = (batch.tiles(t)[b][None] for t in (x, residual, dy))
        own_y, own_dx, *own = run(*rows, batch.alone(b))
        equal(f"y of {b}", batch.tiles(y)[b], own_y[0])
        equal(f"dx of {b}", batch.tiles(dx)[b], own_dx[0])
        for got, wanted in zip(by_expert, own, strict=True):
            equal(f"gradients of expert {e}", got[e], wanted[e])
    assert not any(t[[1, 3]].any() for t in by_expert)


def test_sums_of_more_tiles_than_a_warp_has_lanes():
    """75 tiles of up to 4 chunks, most of one expert: the list of its chunks, by hand."""
    lengths = [(37 * b) % 200 for b in range(75)]
    batch = Batch(lengths, [2 if b % 5 else 0 for b in range(75)])
    dz = normal(batch.rows, 8, seed=3).float()
    with emulated(resident_ctas=64):
        (_, _, (dbias,), _) = linear.grouped_linear_backward(
            dz, dz, [dz.new_empty(EXPERTS, 8, 8)], [dz.new_empty(EXPERTS, 8)], dz.new_empty(0), *batch.ids,
            "none", None, [False, False, True, False],
        )  # fmt: skip
    for e in (0, 2):
        own = [tile for tile, of in zip(batch.tiles(dz), batch.expert, strict=True) if of == e]
        sums = torch.zeros(8, 8)
        for r, part in enumerate(part for tile in own for part in tile.split(64) if len(part)):
            warps = [torch.zeros(8) for _ in range(8)]
            for t, row in enumerate(part):
                warps[t % 8] = warps[t % 8] + row
            sums[r % 8] += functools.reduce(torch.add, warps, torch.zeros(8))
        equal(f"expert {e}", dbias[e], functools.reduce(torch.add, sums, torch.zeros(8)))
    assert not dbias[[1, 3]].any()


# LayerNorm.


@pytest.mark.parametrize(
    "width, dtype",
    [(72, BF16), (73, FP16), (2056, FP32), pytest.param(72, FP32, marks=full)],
    ids=str,
)
def test_layer_norm(width, dtype):
    batch = Batch((35, 0, 1, 33, 0), (2, 3, 0, 2, 1)) if width < 99 else Batch((2, 0, 1), (2, 3, 0))
    x, dy = to(dtype, [normal(batch.rows, width, seed=i) for i in range(2)])
    weight, bias = to(dtype, [normal(EXPERTS, width, seed=i) for i in range(2)])

    def run(x, dy, ids, seed):
        with emulated(seed=seed) as launches:
            y, mean, rstd = norm.grouped_layer_norm(x, weight, bias, *ids, 1e-6)
            grads = norm.grouped_layer_norm_backward(dy, x, weight, bias, mean, rstd, *ids)
        assert len(launches) == 3, launches
        return y, mean, rstd, *grads

    *by_row, dweight, dbias = run(x, dy, batch.ids, 0)
    for b in range(len(batch.lengths)):
        if not batch.lengths[b]:
            continue
        rows = (batch.tiles(t)[b][None] for t in (x, dy))
        *own, own_dweight, own_dbias = run(*rows, batch.alone(b), b)
        for name, got, wanted in zip(("y", "mean", "rstd", "dx"), by_row, own, strict=True):
            equal(f"{name} of tile {b}", batch.tiles(got)[b], wanted[0])
        if batch.expert.count(e := batch.expert[b]) == 1:
            equal(f"dweight of expert {e}", dweight[e], own_dweight[e])
            equal(f"dbias of expert {e}", dbias[e], own_dbias[e])
    assert not dweight[[1, 3]].any() and not dbias[[1, 3]].any(), "experts of no row"
    tiles = [b for b, e in enumerate(batch.expert) if e == 2]
    some = run(batch.of(tiles, x), batch.of(tiles, dy), batch.chosen(tiles).ids, 1)
    equal("dweight of expert 2 alone", some[-2][2], dweight[2])
    equal("dbias of expert 2 alone", some[-1][2], dbias[2])


# route.


def router(width: int, experts: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(width,), (width,), (6, width), (6,), (experts, 6), (experts,)]
    return to(dtype, [normal(*s, seed=i) for i, s in enumerate(shapes)])


RULE = (1e-5, "score_difference", 0.1, "runner_up")
# Tiles in images; the third image's base tile has no row, the second and the fourth have the same one.
IMAGE_OF_TILE, BASE_TILE = [0, 0, 1, 2, 2, 3], [1, 2, 4, 2]
LONG = (5, 70, 33, 9, 0, 64)


def routed(x, cu_seqlens, image_of_tile=None, base_tile=None, expert=None, *, width, **options):
    tiles = (None if t is None else torch.tensor(t) for t in (image_of_tile, base_tile, expert))
    with emulated(**options) as launches:
        made = route.route(x, cu_seqlens, *tiles, *router(width, 3, x.dtype), *RULE)
    assert len(launches) == 1, launches
    return made


@pytest.mark.parametrize("width, dtype", [(24, BF16), (73, FP16)], ids=str)
@pytest.mark.parametrize("resident_ctas", [1, 64])
def test_route(width, dtype, resident_ctas):
    batch = Batch(LONG, (0,) * 6)
    x = to(dtype, normal(batch.rows, width, seed=9) + normal(1, width, seed=8))
    hostile = {"resident_ctas": resident_ctas, "quantum": 3, "split": 0.9}
    tiles = functools.partial(routed, width=width)
    got = tiles(x, batch.cu_seqlens, IMAGE_OF_TILE, BASE_TILE, **hostile, seed=1)
    plain = tiles(x, batch.cu_seqlens, **hostile, seed=2)
    for i, b in enumerate(BASE_TILE):
        equal(f"scores of image {i}", got[0][i], plain[0][b])
        equal(f"pooled of image {i}", got[1][i], plain[1][b])
    for b, tile in enumerate(batch.tiles(x)):
        if len(tile):
            alone = tiles(tile[None], None, seed=b)
            equal(f"scores of tile {b}", plain[0][b], alone[0][0])
            equal(f"pooled of tile {b}", plain[1][b], alone[1][0])
            assert plain[2][b] == alone[2][0], b
    assert plain[0][4].isnan().all() and plain[1][4].isnan().all() and plain[2][4] == 0
    wanted = Routing.forced(
        torch.where(got[0].isnan().any(1), 0, plain[2][BASE_TILE])[IMAGE_OF_TILE], 3
    )
    for ids, other in zip(got[2:], wanted, strict=False):
        equal("ids", ids, other)
    forced = tiles(x, batch.cu_seqlens, IMAGE_OF_TILE, BASE_TILE, [2, 0, 1, 2])
    equal("forced", forced[2], torch.tensor([2, 2, 0, 1, 1, 2], dtype=torch.int32))
    equal("scores all the same", forced[0], got[0])


# What is made of these launches.


def test_one_launch_gives_way_to_two_and_three():
    batch = Batch((5, 0, 33), (0, 2, 1))
    weights, biases, _, x, _ = layer(batch, 64, 64, 1, "none", BF16)
    gain, offset = to(BF16, [normal(EXPERTS, 64, seed=3), normal(EXPERTS, 64, seed=4)])
    parameters = to(BF16, [normal(*s) for s in ((64,), (64,), (EXPERTS, 64), (EXPERTS,))])
    parameters[2:2] = [None, None]
    for arch in (80, 90):
        with emulated(arch) as launches:
            y = norm_linear.norm_grouped_linear(
                x, gain, offset, 1e-6, weights, biases, *batch.ids, "gelu"
            )
            h, _, _ = norm.grouped_layer_norm(x, gain, offset, *batch.ids, 1e-6)
            two = linear.grouped_linear(h, weights, biases, *batch.ids, "gelu", None, None, False)
            equal("two launches", y, two[0])
            assert len(launches) == 4, launches
            y, scores, *ids = route_grouped_linear.route_grouped_linear(
                x, batch.cu_seqlens, None, None, None, *parameters, *RULE, gain, offset, 1e-6, weights, biases, "gelu"
            )  # fmt: skip
            assert len(launches) == 7, launches
            alone = route.route(x, batch.cu_seqlens, None, None, None, *parameters, *RULE)
            for got, wanted in zip((scores, *ids), (alone[0], *alone[2:]), strict=True):
                equal("routing", got, wanted)
            again = norm_linear.norm_grouped_linear(
                x, gain, offset, 1e-6, weights, biases, *ids, batch.cu_seqlens, "gelu"
            )
            equal("three launches", y, again)
