"""grouped_layer_norm compiled for a GPU and emulated: accuracy, bits, and how full its stores are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends.reference import grouped_layer_norm as plain
from mixpert_kernels.backends.triton import _configs
from mixpert_kernels.backends.triton import grouped_layer_norm as norm
from mixpert_kernels.testing import assert_as_accurate

from ._emulate import emulated
from ._worker import full

EXPERT = [2, 0, 2, 3]  # none for expert 1
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SEEDS = [0, pytest.param(1, marks=full), pytest.param(2, marks=full)]


def problem(tokens, width, dtype):
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(width)
    rows, table = (len(EXPERT), tokens, width), (4, width)
    return [torch.randn(s, generator=generator).to(dtype) for s in (rows, table, table, rows)]


def run(backend, tensors, expert=EXPERT):
    x, weight, bias, dy = tensors
    ids = Routing.forced(torch.tensor(expert), 4).ids
    y, mean, rstd = backend.grouped_layer_norm(x, weight, bias, *ids, 1e-6)
    grads = backend.grouped_layer_norm_backward(dy, x, weight, bias, mean, rstd, *ids)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y, *grads), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width", [(17, 72), (35, 73), (5, 1152), (2, 4304), (1, 8200)])
def test_is_as_accurate_as_plain_pytorch(tokens, width, dtype, arch, seed):
    tensors = problem(tokens, width, dtype)
    with emulated(arch=arch, seed=seed):
        got = run(norm, tensors)
    usual, truth = run(plain, tensors), run(plain, [t.double() for t in tensors])
    for name in got:
        assert_as_accurate(name, got[name], usual[name], truth[name])
    assert not got["dweight"][1].any() and not got["dbias"][1].any(), "expert 1 has no tile"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [72, 73, 768, 1152])
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(width, arch):
    x, weight, bias, dy = problem(35, width, torch.bfloat16)
    with emulated(arch=arch):
        whole = run(norm, (x, weight, bias, dy))
    with emulated(arch=arch, seed=1):
        again = run(norm, (x, weight, bias, dy))
        parts = {
            tuple(tiles): run(norm, (x[tiles], weight, bias, dy[tiles]), [EXPERT[b] for b in tiles])
            for tiles in ([3], [2, 0], [3, 1, 2, 0])
        }
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
    for tiles, part in parts.items():
        for name in ("y", "dx"):
            assert torch.equal(part[name], whole[name][list(tiles)]), (name, tiles)
    for name in ("dweight", "dbias"):  # tiles 0 and 2 are all that expert 2 has
        assert torch.equal(parts[3, 1, 2, 0][name][[0, 1, 3]], whole[name][[0, 1, 3]]), name


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [72, 73, 1152])
def test_the_number_of_warps_does_not_change_a_bit(width, arch):
    """A kernel with more warps that shares the device code, and LANES, gives what this one gives."""
    x, weight, bias, _ = problem(17, width, torch.bfloat16)
    ids = Routing.forced(torch.tensor(EXPERT), 4).ids
    before, results = _configs.LAYER_NORM, []
    for warps in (4, 8):
        _configs.LAYER_NORM = tuple(dataclasses.replace(row, num_warps=warps) for row in before)
        with emulated(arch=arch):
            results.append(norm.grouped_layer_norm(x, weight, bias, *ids, 1e-6))
    _configs.LAYER_NORM = before
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted), "the order of the sums follows the number of warps"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [768, 1152])
def test_loads_and_stores_fill_their_sectors(width, dtype):
    with emulated(arch=80) as launches:
        run(norm, problem(33, width, dtype))
    for kernel, stats in launches:
        assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)
        assert stats.load_efficiency >= 0.95, (kernel, stats.load_efficiency)
        assert stats.bank_conflicts == 0, (kernel, stats.bank_conflicts)
