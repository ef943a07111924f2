"""grouped_linear's backward, compiled and emulated: dX, weight gradients, and the column sums of bias and scale."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.backends.reference import grouped_linear as reference
from mixpert_kernels.backends.triton import _catalogue, _configs
from mixpert_kernels.backends.triton import grouped_linear as triton
from mixpert_kernels.backends.triton._costs import matrix_flops
from mixpert_kernels.backends.triton.grouped_outer import grouped_outer

from ._cases import DTYPES, EXPERT, EXPERTS, check, ids, normal, to
from ._emulate import emulated
from ._worker import full
from .test_grouped_linear import ACTIVATIONS, CHIPS, path

NAMES = ("dx", "dweight", "dbias", "dscale")


def problem(tokens, depth, width, *, count=1, activation="none", scale=False):
    """Arguments of the host function."""
    batch, columns = len(EXPERT), count * width
    weights = [normal(EXPERTS, width, depth, seed=i) * width**-0.5 for i in range(count)]
    biases = [normal(EXPERTS, width, seed=10 + i) for i in range(count)]
    factor = normal(EXPERTS, columns, seed=21) if scale else None
    dy, x = normal(batch, tokens, columns, seed=22), normal(batch, tokens, depth, seed=23)
    stored = activation != "none" or scale
    pre = normal(batch, tokens, columns, seed=24) if stored else torch.empty(0)
    needs = [True, True, True, scale]
    return [dy, x, weights, biases, pre, *ids(), activation, factor, needs]


def run_on(arch, tma, **options):
    """The host function, emulated on a chip."""

    def run(seed, *args):
        with path(tma), emulated(arch, seed=seed, **options) as launches:
            results = triton.grouped_linear_backward(*args)
        products = [s for k, s in launches if k in ("_linear_dx_kernel", "_grouped_outer_kernel")]
        assert all((s.tma_load_bytes > 0) == tma for s in products), launches
        return results

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_odd_sizes(arch, tma, dtype):
    if tma and dtype == torch.float32:
        pytest.skip("precise float32 has no config with descriptors")
    # A box of dz must not reach into the next weight's columns: with descriptors each has a multiple of 64.
    args = problem(17, 72, 192 if tma else 136, count=3, activation="gelu_tanh", scale=True)
    check(run_on(arch, tma), reference.grouped_linear_backward, args, dtype)


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_tails_like_4304(arch, tma):
    args = problem(145, 64 * 3 + 16, 128 + 80)
    check(run_on(arch, tma), reference.grouped_linear_backward, args, torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    args = problem(17, 40, 72, activation=activation, scale=activation == "relu")
    check(run_on(90, True), reference.grouped_linear_backward, args, torch.bfloat16)


def test_rows_off_16_bytes():
    for arch in (80, 90):
        args = problem(9, 71, 5, count=2, activation="gelu")
        check(run_on(arch, False), reference.grouped_linear_backward, args, torch.bfloat16)


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_bits_depend_on_an_experts_own_tiles_alone(arch, tma):
    """dX of a tile alone, and the gradients of an expert from its own tiles, whatever else is in the batch."""
    args = problem(17, 72, 136, activation="gelu")
    args = [to(torch.bfloat16, value) for value in args]
    dy, x, weights, biases, pre, *_ = args

    def run(tiles, seed):
        rows = list(tiles)
        chosen = ids([EXPERT[b] for b in tiles])
        call = (dy[rows], x[rows], weights, biases, pre[rows], *chosen, "gelu", None, args[-1])
        return run_on(arch, tma, resident_ctas=1 + seed)(seed, *call)

    dx, (dweight,), (dbias,), _ = run((0, 1, 2), 0)
    assert not dweight[[1, 3]].any() and not dbias[[1, 3]].any(), "an expert without a tile"
    for b in range(3):
        assert torch.equal(run((b,), b)[0][0], dx[b]), f"dx of tile {b} alone"
    permuted, *_ = run((2, 1, 0), 1)
    assert torch.equal(permuted, dx[[2, 1, 0]]), "dx permuted"
    _, (own,), (own_bias,), _ = run((0, 2), 2)
    assert torch.equal(own[2], dweight[2]) and torch.equal(own_bias[2], dbias[2]), "expert 2 alone"


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_weight_gradients_are_added_to_a_main_gradient(arch, tma):
    dz, x = (normal(len(EXPERT), 17, width, seed=width).bfloat16() for width in (136, 72))
    _, order, offsets, _ = ids()
    main = normal(EXPERTS, 136, 72).float()
    with path(tma), emulated(arch) as launches:
        (plain,) = grouped_outer(dz, x, [136], order, offsets, EXPERTS, torch.float32)
        out = [main.clone()]
        grouped_outer(dz, x, [136], order, offsets, EXPERTS, torch.float32, out, True)
    assert len(launches) == 2
    assert torch.equal(out[0], main + plain), "one rounding of the sum"


@pytest.mark.parametrize("arch, tma", CHIPS)
def test_products_fill_the_sectors_they_store_and_flops_are_those_computed(arch, tma):
    args = [to(torch.bfloat16, v) for v in problem(128, 128, 128, activation="gelu", scale=True)]
    with path(tma), emulated(arch) as launches:
        triton.grouped_linear_backward(*args)
        recorded = _catalogue.record(
            _configs.nvidia(arch),
            lambda _: triton.grouped_linear_backward(*args),
            _catalogue.Geometry(),
            "",
            "highest",
            False,
        )
    assert len(launches) == len(recorded)
    for (kernel, stats), launch in zip(launches, recorded, strict=True):
        flops = matrix_flops(launch, padded=True)
        assert stats.mma_flops == flops, (kernel, stats.mma_flops, flops)
        if flops:
            assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)


@full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch, tma", CHIPS)
def test_everything(arch, tma, dtype, activation):
    args = problem(145, 208, 192, count=2, activation=activation, scale=True)
    tma = tma and dtype != torch.float32
    check(run_on(arch, tma), reference.grouped_linear_backward, args, dtype)
