"""grouped_linear by wgmma and TMA, emulated: what sm_80's kernels are asked, and what its ring of buffers adds."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.backends.cuda import _configs
from mixpert_kernels.backends.cuda import grouped_linear as cuda
from mixpert_kernels.backends.reference import grouped_linear as reference

from ._cases import EXPERT, check, ids, to
from ._emulate_cuda import emulated
from .test_grouped_linear import ACTIVATIONS, problem

DTYPES = (torch.bfloat16, torch.float16)


def run(seed, *args, choose=None, **options):
    """The host function on an emulated sm_90; one launch of the wgmma kernel."""
    with emulated(90, choose=choose, seed=seed, **options) as launches:
        results = cuda.grouped_linear(*args)
    dtype = _configs.SUFFIX[args[0].dtype]
    assert [kernel for kernel, _ in launches] == [f"grouped_linear_{dtype}_wgmma"]
    assert launches[0].stats.wgmma_instructions and not launches[0].stats.notes, launches[0].stats
    return results


def forced(seed, *args):
    """Also where the host would choose other kernels."""
    return run(seed, *args, choose="wgmma")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(dtype):
    args = problem(17, 72, 136, count=3, activation="gelu_tanh", residual=True, scale=True)
    check(run, reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails_like_4304(dtype):
    """4304 = 33 * 128 + 80 = 67 * 64 + 16; tokens and columns over several blocks."""
    args = problem(145, 64 * 3 + 16, 128 + 80, residual=True)
    check(run, reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("depth, width", [(71, 5), (1, 1), (64, 24)])
def test_rows_off_16_bytes(depth, width):
    args = problem(9, depth, width, count=2, activation="gelu", residual=True, scale=True)
    check(forced, reference.grouped_linear, args, torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation):
    for residual, scale in ((False, False), (True, False), (False, True)):
        args = problem(17, 64, 40, activation=activation, residual=residual, scale=scale)
        check(forced, reference.grouped_linear, args, torch.bfloat16)


def test_few_thread_blocks_share_many_blocks():
    """Two, and one, for twelve blocks: consumers take turns, and the ring goes round many times."""
    args = problem(145, 64 * 3 + 16, 136)
    for multiprocessors in (2, 1):

        def some(seed, *args, of=multiprocessors):
            return run(seed, *args, multiprocessors=of, interleave="warp" if seed else "random")

        check(some, reference.grouped_linear, args, torch.bfloat16)


def test_a_tile_is_the_same_alone_in_a_batch_and_in_any_order():
    args = to(torch.bfloat16, problem(17, 72, 136, count=3, activation="gelu", residual=True))
    x, weights, biases, *_, activation, residual, scale, _ = args

    def of(tiles, seed, x=x):
        chosen = ids([EXPERT[b] for b in tiles])
        rows = list(tiles)
        call = (x[rows], weights, biases, *chosen, activation, residual[rows], scale, False)
        return run(seed, *call, resident_ctas=1 + seed)[0]

    together = of((0, 1, 2), 0)
    assert torch.equal(of((2, 0, 1), 1), together[[2, 0, 1]]), "permuted"
    for b in range(3):
        assert torch.equal(of((b,), 2)[0], together[b]), f"tile {b} alone"
