"""Packed rows by Triton, interpreted: what only this backend has. test_packed.py has what all have."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends import why_not
from mixpert_kernels.backends.reference import route as plain_route
from mixpert_kernels.testing import assert_as_accurate

REASON = why_not("grouped_linear", "triton", device="cpu", dtype=torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mixpert_kernels.backends.triton import _configs, _dx, _launch, grouped_linear  # noqa: E402
from mixpert_kernels.backends.triton import route as ours  # noqa: E402
from mixpert_kernels.backends.triton._reduce import sum_by_expert  # noqa: E402
from mixpert_kernels.backends.triton._tiles import Rows, locate_rows  # noqa: E402
from mixpert_kernels.backends.triton.grouped_outer import grouped_outer  # noqa: E402

NAN = math.nan
EXPERTS = 4
LENGTHS = (17, 0, 130, 1, 0)
EXPERT = (2, 2, 0, 2, 1)
RULE = (1e-5, "score_difference", 0.1, "runner_up")


def begins(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ids(expert=EXPERT):
    return Routing.forced(torch.tensor(expert), EXPERTS)[:3]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def launches(monkeypatch):
    """The configs of the launches so far."""
    seen, launch = [], _launch.launch

    def record(kernel, grid, args, config):
        seen.append((config, grid))
        launch(kernel, grid, args, config)

    monkeypatch.setattr(_launch, "launch", record)
    return seen


@pytest.fixture
def tma(monkeypatch):
    """A chip with tensor descriptors, and float32 products that may use them."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("this Triton does not interpret tensor descriptors")
    monkeypatch.setattr(_configs, "chip", lambda device: _configs.nvidia(90, 4))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@triton.jit(do_not_specialize=["batch", "tokens"])
def _locate_kernel(cu_seqlens_ptr, out_ptr, batch, tokens, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    tile, begin, rows, first = locate_rows(block, batch, tokens, None, cu_seqlens_ptr, BLOCK)
    tl.store(out_ptr + 4 * block, tile)
    tl.store(out_ptr + 4 * block + 1, begin)
    tl.store(out_ptr + 4 * block + 2, rows)
    tl.store(out_ptr + 4 * block + 3, first)


@pytest.mark.parametrize("block", [1, 4, 32])
def test_every_block_of_every_tile_is_found_once(block):
    draw = random.Random(block)
    for _ in range(10):
        lengths = [draw.choice((0, 0, 1, 3, 4, 5, 8, 31, 40)) for _ in range(draw.randint(1, 9))]
        cu = begins(lengths)
        rows = Rows.of(torch.empty(sum(lengths), 1), cu)
        (programs,) = rows.blocks(block)
        assert programs == sum(lengths) // block + len(lengths)
        out = torch.full((programs, 4), -1, dtype=torch.int32)
        _locate_kernel[(programs,)](cu, out, rows.batch, rows.tokens, block)
        for tile, begin, count, _ in out.tolist():
            assert (begin, count) == (cu[tile], lengths[tile])
        found = sorted((tile, first) for tile, _, count, first in out.tolist() if first < count)
        wanted = [(b, first) for b, n in enumerate(lengths) for first in range(0, n, block)]
        assert found == wanted, lengths


@pytest.mark.parametrize("count", [1, 3])
def test_descriptors_and_a_persistent_grid_give_bitwise_what_pointers_give(
    tma, launches, monkeypatch, count
):
    cu, rows = begins(LENGTHS), sum(LENGTHS)
    x, weights = normal(rows, 72), [normal(EXPERTS, 64, 72, seed=i) for i in range(count)]
    dz, residual = normal(rows, 64 * count, seed=4), normal(rows, 64 * count, seed=5)

    def run():
        made = grouped_linear.grouped_linear(
            x, weights, [], *ids(), cu, "gelu", residual, None, True
        )
        return (*made, _dx.linear_dx(dz, weights, *ids()[:2], cu_seqlens=cu)[0])

    got = run()
    assert [config.tma for config, _ in launches] == [True, True]
    row = dataclasses.replace(launches[0][0], group=3, programs_per_multiprocessor=1)
    monkeypatch.setenv("MIXPERT_TMA", "0")
    wanted = run()
    assert not any(config.tma for config, _ in launches[2:])
    monkeypatch.setattr(_configs, "gemm_rows", lambda *_: [row])
    persistent = run()
    assert launches[-1][1] == (4,)
    for a, b, c in zip(got, wanted, persistent, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)


def test_outer_takes_no_descriptors_and_no_row_of_a_neighbour(tma, launches):
    """A box would end in the next tile, and 0 times what stands there may be NaN."""
    x, dz = normal(sum(LENGTHS), 72).half(), normal(sum(LENGTHS), 40, seed=1).half()
    options = {"cu_seqlens": begins(LENGTHS)}
    order, offsets = ids()[1:]
    (before,) = grouped_outer(dz, x, [40], order, offsets, EXPERTS, torch.float32, **options)
    assert not launches[0][0].tma
    for b in (0, 3):  # all that expert 2 has, around the tile of expert 0
        x.split(LENGTHS)[b][:], dz.split(LENGTHS)[b][:] = NAN, NAN
    (after,) = grouped_outer(dz, x, [40], order, offsets, EXPERTS, torch.float32, **options)
    assert after[2].isnan().all() and torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    truth = dz[17:147].double().T @ x[17:147].double()
    assert_as_accurate("dw", after[0], dz[17:147].float().T @ x[17:147].float(), truth)
    assert not after[[1, 3]].any(), "an expert without rows"


@pytest.mark.parametrize("columns", [1, 40])
def test_sums_by_expert_of_many_tiles_of_many_chunks(columns):
    """More tiles of an expert and more chunks of a tile than are added side by side; parts that nobody wrote."""
    draw = random.Random(0)
    lengths = [draw.choice((0, 1, 31, 32, 33, 700)) for _ in range(30)]
    expert = [draw.choice((0, 1, 1, 3)) for _ in lengths]
    cu = begins(lengths)
    parts = torch.full((*Rows.of(torch.empty(sum(lengths), 1), cu).blocks(32), columns), NAN)
    own = [[] for _ in range(EXPERTS)]
    for b, (length, e) in enumerate(zip(lengths, expert, strict=True)):
        first, chunks = int(cu[b]) // 32 + b, triton.cdiv(length, 32)
        parts[first : first + chunks] = normal(chunks, columns, seed=b)
        own[e].append(parts[first : first + chunks])
    _, order, offsets = ids(expert)
    options = {"cu_seqlens": cu, "chunk": 32}
    got = sum_by_expert(parts, order, offsets, EXPERTS, torch.float32, **options)
    own = [torch.cat([torch.zeros(1, columns), *chunks]) for chunks in own]
    wanted, truth = (torch.stack([c.sum(0) for c in own]), torch.stack([c.double().sum(0) for c in own]))  # fmt: skip
    assert_as_accurate("sums", got, wanted, truth)
    assert not got[2].any()


def test_a_tile_that_is_the_base_of_two_images():
    lengths = (40, 3, 1, 7)
    cu, x = begins(lengths), normal(sum(lengths), 24)
    router = [normal(24), normal(24), None, None, normal(EXPERTS, 24, seed=2), normal(EXPERTS)]
    tiles = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 3, 0])
    got = ours.route(x, cu, *tiles, None, *router, *RULE)
    alone = ours.route(x, cu, None, None, None, *router, *RULE)
    assert torch.equal(got[0], alone[0][tiles[1]]) and torch.equal(got[1], alone[1][tiles[1]])
    assert torch.equal(got[2], alone[2][tiles[1]][tiles[0]])
    given = normal(3, EXPERTS, seed=3), normal(3, 24, seed=4)
    rest = (x, cu, tiles[1], *router[:5], *got[:2], 1e-5, True)
    for one, other in zip(
        ours.route_backward(*given, *rest), plain_route.route_backward(*given, *rest), strict=True
    ):
        torch.testing.assert_close(one, other)
