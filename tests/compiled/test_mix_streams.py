"""mix_streams compiled for a GPU and emulated: accuracy, races, bounds, and that backward reads the streams once."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.backends.reference import mix_streams as plain
from mixpert_kernels.backends.triton import mix_streams as ours

from ._cases import DTYPES, check, normal
from ._emulate import emulated

BATCH = 2


def problem(count, tokens, width, cls):
    """dy, logits, cls, streams."""
    shapes = [(BATCH, tokens + cls, width), (BATCH, count), (BATCH, width)]
    shapes += [(BATCH, tokens, width)] * count
    dy, logits, first, *streams = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    return [dy, logits, first if cls else None, streams]


def run(backend, dy, logits, cls, streams, needs=(True, True)):
    y = backend.mix_streams(logits, streams, cls)
    rest = backend.mix_streams_backward(dy, logits, streams, cls is not None, list(needs))
    return y, *rest


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "count, tokens, width, cls",
    [(3, 9, 1160, True), (2, 5, 73, False), (8, 3, 40, True)],
    ids=str,
)
def test_is_as_accurate_as_plain_pytorch(count, tokens, width, cls, dtype, arch):
    """9 x 1160 numbers are two chunks, the last block of which is not full; rows of 73 lie anywhere."""

    def emulate(seed, *args):
        with emulated(arch, seed=seed) as launches:
            results = run(ours, *args)
        names = [
            kernel.removeprefix("_mix_streams").removesuffix("kernel") for kernel, _ in launches
        ]
        assert names == ["_", "_backward_", "_logits_"], names
        return results

    check(emulate, lambda *args: run(plain, *args), problem(count, tokens, width, cls), dtype)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_tile_is_bitwise_the_same_alone_and_beside_nan(arch):
    dy, logits, cls, streams = problem(3, 9, 1024, True)
    given = [t.bfloat16() for t in (dy, logits, cls, *streams)]
    with emulated(arch):
        whole = run(ours, *given[:3], given[3:])
    alone = [t[1:].clone() for t in given]
    beside = [t.clone() for t in given]
    for t in beside:
        t[0] = torch.nan
    for tensors in (alone, beside):
        with emulated(arch, seed=1):
            y, dlogits, dstreams = run(ours, *tensors[:3], tensors[3:])
        pairs = zip((y, dlogits, *dstreams), (*whole[:2], *whole[2]), strict=True)
        assert all(torch.equal(got[-1], wanted[-1]) for got, wanted in pairs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_what_is_not_needed_is_neither_read_nor_written(needs):
    dy, logits, cls, streams = problem(2, 3, 64, True)
    given = [t.bfloat16() for t in (dy, logits, cls, *streams)]
    with emulated(80):
        both = run(ours, *given[:3], given[3:])
    with emulated(80) as launches:
        _, dlogits, dstreams = run(ours, *given[:3], given[3:], needs)
    if needs[0]:
        assert torch.equal(dlogits, both[1]) and dstreams == []
    else:
        assert all(torch.equal(g, w) for g, w in zip(dstreams, both[2], strict=True))
        assert dlogits.numel() == 0 and len(launches) == 2, "no sum of parts"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_number_is_read_once_sixteen_bytes_at_a_time(dtype):
    dy, logits, cls, streams = problem(3, 8, 4096, True)
    given = [t.to(dtype) for t in (dy, logits, cls, *streams)]
    with emulated(80) as launches:
        run(ours, *given[:3], given[3:])
    read = {
        "_mix_streams_kernel": given[2:],
        "_mix_streams_backward_kernel": [given[0], *given[3:]],
    }
    for kernel, stats in launches[:2]:
        needed, read_bytes = sum(t.nbytes for t in read[kernel]), 32 * stats.global_load_sectors
        assert read_bytes < 1.05 * needed, (kernel, read_bytes, needed)
        assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)
        assert stats.load_efficiency >= 0.95, (kernel, stats.load_efficiency)
        assert "ld.global.v4.b32" in stats.compiled.ptx, f"{kernel} has no load of 16 bytes"
