"""grouped_linear, compiled and emulated: bfloat16 too, on both load paths, under several schedules."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from mixpert_kernels.backends.reference import grouped_linear as reference
from mixpert_kernels.backends.triton import _catalogue, _configs
from mixpert_kernels.backends.triton import grouped_linear as triton
from mixpert_kernels.backends.triton._costs import matrix_flops

from ._cases import DTYPES, EXPERT, EXPERTS, check, ids, normal, to
from ._emulate import emulated
from ._worker import full

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")
CHIPS = [(80, False), (90, False), (90, True)]  # architecture, tensor descriptors
PERSISTENT = 1  # the row of configs


@contextlib.contextmanager
def path(tma: bool) -> Iterator[None]:
    os.environ["MIXPERT_TMA"] = str(int(tma))
    try:
        yield
    finally:
        del os.environ["MIXPERT_TMA"]


def problem(tokens, depth, width, *, count=1, activation="none", residual=False, scale=False):
    """Arguments of the host function; widths of the weights differ by nothing."""
    batch, columns = len(EXPERT), count * width
    weights = [normal(EXPERTS, width, depth, seed=i) * depth**-0.5 for i in range(count)]
    biases = [normal(EXPERTS, width, seed=10 + i) for i in range(count)]
    added = normal(batch, tokens, columns, seed=20) if residual else None
    factor = normal(EXPERTS, columns, seed=21) if scale else None
    x = normal(batch, tokens, depth, seed=22)
    return [x, weights, biases, *ids(), activation, added, factor, True]


def run_on(arch, tma, **options):
    """The host function, emulated on a chip."""

    def run(seed, *args):
        with path(tma), emulated(arch, seed=seed, **options) as launches:
            results = triton.grouped_linear(*args)
        assert len(launches) == 1, launches
        assert (launches[0].stats.tma_load_bytes > 0) == tma, launches[0].stats
        return results

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_odd_sizes(arch, tma, dtype):
    args = problem(17, 72, 136, count=3, activation="gelu_tanh", residual=True, scale=True)
    tma = tma and dtype != torch.float32  # precise float32 has no config with descriptors
    check(run_on(arch, tma), reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_tails_like_4304(arch, tma):
    """4304 = 33 * 128 + 80 = 67 * 64 + 16; tokens and columns over several blocks."""
    args = problem(145, 64 * 3 + 16, 128 + 80, residual=True)
    check(run_on(arch, tma), reference.grouped_linear, args, torch.bfloat16)


@pytest.mark.parametrize("depth, width", [(71, 5), (1, 1), (64, 24)])
def test_rows_off_16_bytes(depth, width):
    args = problem(9, depth, width, count=2, activation="gelu")
    for arch in (80, 90):
        tma = arch == 90 and depth % 8 == 0
        check(run_on(arch, tma), reference.grouped_linear, args, torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation):
    for residual, scale in ((False, False), (True, False), (False, True)):
        args = problem(17, 64, 40, activation=activation, residual=residual, scale=scale)
        check(run_on(90, True), reference.grouped_linear, args, torch.bfloat16)


def test_persistent_grid():
    """Two programs share twelve blocks."""
    args = problem(145, 72, 136)
    run = run_on(90, True, row=PERSISTENT, multiprocessors=2)
    check(run, reference.grouped_linear, args, torch.bfloat16)


def test_float32_in_one_tf32_product():
    """As accurate as a product of operands cut to TF32's ten bits."""
    args = problem(17, 72, 136)
    cut = [t.float().view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in args[1]]
    x = args[0].float().view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        for arch in (80, 90):
            got, _ = run_on(arch, arch == 90)(0, *to(torch.float32, args))
            plain, _ = reference.grouped_linear(x, cut, *to(torch.float32, args)[2:])
            truth, _ = reference.grouped_linear(*args)
            error, bound = ((t.double() - truth).abs().max() for t in (got, plain))
            assert error <= 2 * bound, f"sm_{arch}: error {error}, of cut operands {bound}"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_a_tile_is_the_same_alone_in_a_batch_and_in_any_order(arch, tma):
    args = to(torch.bfloat16, problem(17, 72, 136, count=3, activation="gelu", residual=True))
    x, weights, biases, *_, activation, residual, scale, _ = args

    def run(tiles, seed):
        chosen = ids([EXPERT[b] for b in tiles])
        rows = list(tiles)
        call = (x[rows], weights, biases, *chosen, activation, residual[rows], scale, False)
        with path(tma), emulated(arch, seed=seed, resident_ctas=1 + seed) as _:
            return triton.grouped_linear(*call)[0]

    together = run((0, 1, 2), 0)
    assert torch.equal(run((2, 0, 1), 1), together[[2, 0, 1]]), "permuted"
    for b in range(3):
        assert torch.equal(run((b,), 2)[0], together[b]), f"tile {b} alone"


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_stores_fill_their_sectors(arch, tma):
    args = to(torch.bfloat16, problem(128, 64, 128, residual=True, scale=True))
    with path(tma), emulated(arch) as launches:
        triton.grouped_linear(*args)
    (_, stats) = launches[0]
    assert stats.store_efficiency >= 0.95, stats.store_efficiency


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_the_counted_flops_are_those_computed(arch, tma):
    """``mixpert kernels`` computes what the emulator counts."""
    args = to(torch.bfloat16, problem(17, 72, 136, count=2))
    with path(tma), emulated(arch) as launches:
        triton.grouped_linear(*args)
        (launch,) = _catalogue.record(
            _configs.nvidia(arch),
            lambda _: triton.grouped_linear(*args),
            _catalogue.Geometry(),
            "",
            "highest",
            False,
        )
    assert launches[0].stats.mma_flops == matrix_flops(launch, padded=True), launches[0].stats


@full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_everything(arch, tma, dtype, activation):
    args = problem(145, 208, 208, count=2, activation=activation, residual=True, scale=True)
    tma = tma and dtype != torch.float32
    check(run_on(arch, tma), reference.grouped_linear, args, dtype)
