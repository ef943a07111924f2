"""grouped_linear by wgmma and TMA, emulated: what the other kernels are asked, and what its ring of buffers adds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ptxsim
import pytest
import torch

from mixpert_kernels.backends.chips import nvidia
from mixpert_kernels.backends.cuda import _configs, _wgmma
from mixpert_kernels.backends.cuda import grouped_linear as cuda
from mixpert_kernels.backends.reference import grouped_linear as reference
from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from . import _emulate_cuda
from ._cases import EXPERT, check, ids, to
from ._emulate_cuda import emulated
from ._worker import full
from .test_cuda_grouped_linear import problem

BF16 = torch.bfloat16
HALF = (torch.bfloat16, torch.float16)
SOURCE = "grouped_linear_sm90a.cuh"


def launched(seed, *args, choose=None, **options):
    """Results of the host function on an emulated sm_90, and the counters of its launch."""
    with emulated(90, choose=choose, seed=seed, **options) as launches:
        results = cuda.grouped_linear(*args)
    (launch,) = launches
    assert launch.kernel == _wgmma.kernel(args[0].dtype), launch.kernel
    assert launch.stats.bank_conflicts == 0 and not launch.stats.notes, launch.stats
    return results, launch.stats


def run(seed, *args, **options):
    return launched(seed, *args, **options)[0]


def forced(seed, *args):
    """Also where the host would choose other kernels."""
    return run(seed, *args, choose="wgmma")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_odd_sizes(dtype):
    args = problem(17, 72, 136, count=3, activation="gelu_tanh", residual=True, scale=True)
    check(run, reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tails_like_4304(dtype):
    """4304 = 33 * 128 + 80 = 67 * 64 + 16; tokens and columns over several blocks."""
    args = problem(145, 64 * 3 + 16, 128 + 80, residual=True, expert=(2, 0))
    check(run, reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("depth, width", [(71, 5), (1, 1), (64, 24)])
def test_rows_off_16_bytes(depth, width):
    args = problem(9, depth, width, count=2, activation="gelu", residual=True, scale=True)
    check(forced, reference.grouped_linear, args, BF16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    args = problem(17, 64, 40, activation=activation, residual=True, scale=True, expert=(2, 0))
    check(forced, reference.grouped_linear, args, BF16)


@pytest.mark.parametrize("part", ["residual", "scale", "bias", "none"])
def test_parts_of_the_epilogue(part):
    parts = {name: name == part for name in ("residual", "scale", "bias")}
    args = problem(17, 64, 40, activation="gelu", expert=(2, 0), **parts)
    check(forced, reference.grouped_linear, args, BF16)


def test_few_thread_blocks_share_many_blocks():
    """One, and two, for four blocks: the consumers take turns, and the ring goes round twice in each."""
    args = problem(17, 64 * 11 + 16, 136, expert=(2, 0))

    def scheduled(seed, *given):
        options = {"interleave": "warp", "quantum": 30} if seed == 2 else {}
        return run(seed, *given, multiprocessors=1 + seed % 2, **options)

    check(scheduled, reference.grouped_linear, args, BF16)


def test_a_tile_is_the_same_alone_in_a_batch_and_in_any_order():
    args = to(BF16, problem(17, 72, 136, count=3, activation="gelu", residual=True))
    x, weights, biases, *_, activation, residual, scale, _ = args

    def of(tiles, seed):
        chosen, rows = ids([EXPERT[b] for b in tiles]), list(tiles)
        call = (x[rows], weights, biases, *chosen, activation, residual[rows], scale, False)
        return run(seed, *call, resident_ctas=1 + seed)[0]

    together = of((0, 1, 2), 0)
    assert torch.equal(of((2, 0, 1), 1), together[[2, 0, 1]]), "permuted"
    for b in range(3):
        assert torch.equal(of((b,), 2)[0], together[b]), f"tile {b} alone"


def test_layouts_of_the_features():
    """Expanded, a part of a larger tensor, and with a last dimension that is not dense: the same bits."""
    args = to(BF16, problem(17, 72, 72, expert=(2, 2, 2)))
    x, *rest = args
    x = x[:1].expand(3, -1, -1)
    dense = run(0, x.contiguous(), *rest)[0]
    wide = x.new_zeros(3, 20, 80)
    wide[:, 2:19, :72] = x
    layouts = {
        "expanded": x,
        "a part": wide[:, 2:19, :72],
        "off 16 bytes": torch.cat([x[..., :1], x], -1)[..., 1:],
        "transposed": x.mT.contiguous().mT,
    }
    for name, given in layouts.items():
        assert torch.equal(run(1, given, *rest)[0], dense), name


def test_full_sectors_and_whole_products():
    args = to(BF16, problem(128, 128, 128, residual=True, scale=True))
    _, stats = launched(0, *args)
    assert stats.store_efficiency >= 0.95, stats.store_efficiency
    assert stats.mma_flops == 2 * len(EXPERT) * 128**3, stats.mma_flops
    assert stats.tma_load_bytes == 2 * len(EXPERT) * 2 * 128 * 128, stats.tma_load_bytes


def kernels_of(args, arch=90, choose=None):
    with emulated(arch, choose=choose) as launches:
        cuda.grouped_linear(*args)
    return [kernel.removeprefix("grouped_linear_") for kernel, _ in launches]


def test_which_layers_it_serves():
    args = to(BF16, problem(3, 64, 64, expert=(0,)))
    assert kernels_of(args) == ["bf16_wgmma"]
    assert kernels_of(args, choose="large") == ["bf16_large"]
    assert kernels_of(args, arch=80) == ["bf16_small"]
    os.environ["MIXPERT_TMA"] = "0"
    try:
        assert kernels_of(args) == ["bf16_small"]
    finally:
        del os.environ["MIXPERT_TMA"]
    assert kernels_of(to(BF16, problem(3, 64, 56, expert=(0,)))) == ["bf16_small"], "few columns"
    assert kernels_of(to(BF16, problem(3, 56, 64, expert=(0,)))) == ["bf16_small"], "little depth"
    with emulated(90):
        for chip, dtype in ((100, BF16), (120, BF16), (90, torch.float32)):
            assert not _wgmma.serves(nvidia(chip), dtype, 1152, 1152), (chip, dtype)
        assert _configs.choice() is None
        for columns, depth in ((3456, 1152), (1152, 4304), (4304, 1152), (3584, 3584)):
            assert _wgmma.serves(nvidia(90), BF16, columns, depth), (columns, depth)


@contextlib.contextmanager
def broken(old: str, new: str) -> Iterator[None]:
    """Within, the emulator runs kernels from sources that differ in this."""
    caches = [_emulate_cuda.ptx, _emulate_cuda.modules, _emulate_cuda._load, _emulate_cuda._facts]
    sources = _emulate_cuda.SOURCES
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cuda"
        shutil.copytree(sources, copy)
        text = (copy / SOURCE).read_text()
        assert text.count(old) == 1, old
        (copy / SOURCE).write_text(text.replace(old, new))
        try:
            _emulate_cuda.SOURCES = copy
            for cache in caches:
                cache.cache_clear()
            yield
        finally:
            _emulate_cuda.SOURCES = sources
            for cache in caches:
                cache.cache_clear()


FULL_WAIT = "    hopper::wait(full(ring.stage), ring.parity);\n"
TURN_WAIT = "      hopper::wait(turn(me), parity);\n"
GIVEN_BACK = "      if (hopper::elected()) hopper::arrive(left);\n"


@pytest.mark.parametrize(
    "old, new, errors",
    [
        (FULL_WAIT, "", (ptxsim.UninitializedRead, ptxsim.RaceError)),
        (TURN_WAIT, "", (ptxsim.UninitializedRead, ptxsim.RaceError)),
        pytest.param(GIVEN_BACK, "", (ptxsim.DeadlockError,), marks=full),
        pytest.param("wait_groups<1>", "wait_groups<2>", (ptxsim.RaceError,), marks=full),
        pytest.param(
            "arrive_and_expect(full(ring.stage), Config::kStageBytes)",
            "arrive_and_expect(full(ring.stage), Config::kOperandBytes)",
            (ptxsim.UninitializedRead, ptxsim.RaceError, ptxsim.ExecutionError),
            marks=full,
        ),
    ],
    ids=["full", "turn", "empty", "wgmma", "bytes"],
)
def test_a_missing_wait_is_noticed(old, new, errors):
    """By some schedule of a few: the emulator would see what a GPU shows rarely."""
    args = to(BF16, problem(17, 64 * 11 + 16, 136, expert=(2, 0)))
    options = {"multiprocessors": 1, "interleave": "warp", "livelock_steps": 20_000}
    with broken(old, new):
        noticed = 0
        for seed in range(4):
            try:
                run(seed, *args, **options)
            except errors:
                noticed += 1
                break
    assert noticed, "no schedule showed it"
