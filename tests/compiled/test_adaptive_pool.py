"""adaptive_pool compiled for a GPU and emulated: accuracy, races, bounds, and loads of 16 bytes."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels import Grids
from mixpert_kernels.backends.reference import adaptive_pool as plain
from mixpert_kernels.backends.triton import adaptive_pool as ours

from ._cases import DTYPES, check, normal
from ._emulate import emulated
from ._worker import full

SIZES = ((3, 5), (1, 40), (17, 2))


def run(backend, x, dy, bins, sizes=SIZES):
    grids = Grids.of(sizes)
    y = backend.adaptive_pool(x, *grids, *bins)
    return y, backend.adaptive_pool_backward(dy, *grids, x.shape[0], *bins)


def problem(channels, bins, sizes=SIZES):
    """x, dy."""
    shapes = (sum(h * w for h, w in sizes), channels), (len(sizes), bins[0] * bins[1], channels)
    return [normal(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, bins", [(264, (16, 6)), (73, (3, 7)), (3, (1, 1))], ids=str)
def test_is_as_accurate_as_plain_pytorch(channels, bins, dtype, arch):
    """264 channels are a slice and 8 more; rows of 73 and 3 begin at no multiple of 16 bytes."""

    def emulate(seed, x, dy):
        with emulated(arch, seed=seed) as launches:
            results = run(ours, x, dy, bins)
        assert [kernel for kernel, _ in launches] == [
            "_adaptive_pool_kernel",
            "_adaptive_pool_backward_kernel",
        ], "one launch a batch each way"
        return results

    check(emulate, lambda x, dy: run(plain, x, dy, bins), problem(channels, bins), dtype)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
@pytest.mark.parametrize("size", [(1, 2048), (45, 45)], ids=str)
def test_from_one_row_to_a_square(size, arch):
    def emulate(seed, x, dy):
        with emulated(arch, seed=seed):
            return run(ours, x, dy, (16, 16), [size])

    reference = lambda x, dy: run(plain, x, dy, (16, 16), [size])  # noqa: E731
    check(emulate, reference, problem(8, (16, 16), [size]), torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
def test_an_image_is_bitwise_the_same_alone_in_any_order_and_beside_nan(arch):
    x, dy = (t.bfloat16() for t in problem(24, (16, 16)))
    images = x.split([h * w for h, w in SIZES])
    with emulated(arch):
        whole = run(ours, x, dy, (16, 16))
    wanted = list(zip(whole[0], whole[1].split([len(i) for i in images]), strict=True))
    for order in ([1], [2, 0, 1]):
        rows = [images[b].clone() for b in order]
        given = dy[order].clone()
        for place, b in enumerate(order[:-1]):
            if b == 0:
                rows[place][:], given[place] = torch.nan, torch.nan
        with emulated(arch, seed=1):
            y, dx = run(ours, torch.cat(rows), given, (16, 16), [SIZES[b] for b in order])
        for b, *got in zip(order, y, dx.split([len(r) for r in rows]), strict=True):
            if b != 0 or len(order) == 1:
                assert all(torch.equal(g, w) for g, w in zip(got, wanted[b], strict=True)), b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loads_and_stores_fill_their_sectors(dtype):
    x, dy = (t.to(dtype) for t in problem(256, (16, 16), [(32, 32)]))
    with emulated(80) as launches:
        run(ours, x, dy, (16, 16), [(32, 32)])
    for kernel, stats in launches:
        assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)
        assert stats.load_efficiency >= 0.95, (kernel, stats.load_efficiency)
        assert "global.v4.b32" in stats.compiled.ptx, f"{kernel} has no access of 16 bytes"
        # Backward reads a patch's one bin, and finds its image: a quarter more of float32, from L1.
        read = 32 * stats.global_load_sectors
        assert read < 1.3 * x.nbytes, (kernel, read, x.nbytes)
