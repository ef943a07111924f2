"""grouped_adapter compiled for a GPU and emulated: accuracy, bits, odd sizes, packed rows, launches and traffic."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends.reference import grouped_adapter as plain
from mixpert_kernels.backends.triton import _configs_adapter as configs
from mixpert_kernels.backends.triton import grouped_adapter as ours
from mixpert_kernels.testing import assert_as_accurate

from ._cases import EXPERTS, flat, normal, to
from ._emulate import emulated
from ._worker import full

EXPERT = (2, 0, 2)  # adapters 1 and 3 have no sample
LENGTHS, PACKED = (5, 0, 66, 1), (2, 0, 1, 2)  # blocks have 64 rows
NEEDS = [True] * 7
SPAN = 64  # columns of a program, so that narrow features have several
# T, D, H: rows that start at no multiple of 16 bytes and a last program with few columns, everywhere; tails of the
# blocks of tokens; the hidden numbers of half a block; as many as there may be.
SIZES = [
    (17, 75, 20),
    *(pytest.param(s, marks=full) for s in ((70, 72, 64), (3, 40, 5), (65, 24, 128))),
]
BOTH = pytest.mark.parametrize("arch", [80, 90])
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=full) for i in (1, 2))])


def problem(tokens, width, hidden, lengths=None):
    """x, down, down_bias, up, up_bias, scale, residual, dy."""
    rows = (len(EXPERT), tokens) if lengths is None else (sum(lengths),)
    return [
        normal(*rows, width, seed=0),
        normal(EXPERTS, hidden, width, seed=1) * width**-0.5,
        normal(EXPERTS, hidden, seed=2),
        normal(EXPERTS, width, hidden, seed=3) * hidden**-0.5,
        normal(EXPERTS, width, seed=4),
        normal(EXPERTS, seed=5),
        normal(*rows, width, seed=6),
        normal(*rows, width, seed=7),
    ]


def ids(expert=EXPERT, lengths=None):
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    return Routing.forced(torch.tensor(expert), EXPERTS, cu_seqlens=cu).ids


@contextlib.contextmanager
def spans(columns):
    """Within, a program computes so many columns."""
    before = configs.ADAPTER
    configs.ADAPTER = {
        name: tuple(dataclasses.replace(row, span=columns) for row in rows)
        for name, rows in before.items()
    }
    try:
        yield
    finally:
        configs.ADAPTER = before


def step(backend, routing, x, *rest):
    """Output for inference, what training keeps, and all gradients."""
    *params, residual, dy = rest
    y, _ = backend.grouped_adapter(x, *params, *routing, residual, False)
    bare, hidden = backend.grouped_adapter(x, *params, *routing, None, True)
    return [
        y,
        bare,
        hidden,
        backend.grouped_adapter_backward(dy, x, *params, hidden, *routing, NEEDS),
    ]


def check(arch, seed, dtype, args, routing):
    args = to(dtype, args)
    with spans(SPAN), emulated(arch, seed=seed):
        got = flat(step(ours, routing, *args))
    usual, truth = (flat(step(plain, routing, *given)) for given in (args, to(torch.float64, args)))
    assert len(got) == 10, len(got)
    for i, tensors in enumerate(zip(got, usual, truth, strict=True)):
        assert_as_accurate(f"result {i}", *tensors)


@SEEDS
@BOTH
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=full)], ids=str
)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_as_accurate_as_the_reference(sizes, dtype, arch, seed):
    check(arch, seed, dtype, problem(*sizes), ids())


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
def test_float32(arch):
    check(arch, 0, torch.float32, problem(17, 40, 20), ids())


@SEEDS
@pytest.mark.parametrize("arch", [pytest.param(80, marks=full), 90])
def test_packed_rows(arch, seed):
    """Tiles of no row, of one, and of more than a block."""
    check(arch, seed, torch.bfloat16, problem(0, 75, 20, LENGTHS), ids(PACKED, LENGTHS))


@pytest.mark.parametrize("arch", [pytest.param(80, marks=full), 90])
def test_a_sample_is_the_same_alone_in_any_order_packed_and_beside_nan(arch):
    """Its output and the gradients of its features and probabilities."""
    args = to(torch.bfloat16, problem(17, 72, 20))
    own = (0, 6, 7)  # features, residual, dy

    def run(samples, lengths=None, spoilt=(), seed=0):
        given = [t[samples] if i in own else t for i, t in enumerate(args)]
        for i in own:
            given[i][list(spoilt)] = torch.nan
            given[i] = given[i] if lengths is None else given[i].flatten(0, 1)
        with emulated(arch, seed=seed):
            y, _, _, grads = step(ours, ids([EXPERT[b] for b in samples], lengths), *given)
        shape = (len(samples), 17, 72)
        return y.view(shape), grads[0].view(shape), grads[6]

    whole = run([0, 1, 2])
    alone = run([1], seed=1)
    moved = run([2, 0, 1], (17, 17, 17), spoilt=[1], seed=2)
    for name, wanted, one, packed in zip(("y", "dx", "dp"), whole, alone, moved, strict=True):
        assert torch.equal(one[0], wanted[1]), f"{name} alone"
        assert torch.equal(packed[[0, 2]], wanted[[2, 1]]), f"{name} moved, packed, beside nan"


@BOTH
def test_zero_up_projections_give_the_residual_bitwise(arch):
    args = to(torch.bfloat16, problem(17, 72, 20))
    args[3].zero_()
    args[4].zero_()
    args[6][:, ::3] = -0.0
    with emulated(arch):
        y, _ = ours.grouped_adapter(*args[:6], *ids(), args[6], False)
    assert torch.equal(y.view(torch.int16), args[6].view(torch.int16)), "not the residual's bits"


@BOTH
def test_inference_is_one_launch_of_one_adapter_whose_hidden_numbers_stay_on_chip(arch):
    args = to(torch.bfloat16, problem(64, 128, 64))
    with emulated(arch) as launches:
        ours.grouped_adapter(*args[:6], *ids(), args[6], False)
    ((kernel, stats),) = launches
    assert kernel == "_grouped_adapter_kernel", kernel
    assert stats.mma_flops == 3 * 2 * 2 * 64 * 128 * 64, (
        "more than two products of the chosen adapter"
    )
    assert stats.global_store_bytes == 3 * 64 * 128 * 2, "more than the output is stored"
    assert stats.load_efficiency >= 0.95 and stats.store_efficiency >= 0.95, stats.as_dict()


def test_the_number_of_programs_follows_from_rows_and_width_alone():
    """One token as well as 64 is shared by two programs, where a program computes 64 of 72 columns."""
    for tokens, blocks in ((1, 1), (65, 2)):
        args = to(torch.bfloat16, problem(tokens, 72, 16))
        with spans(SPAN), emulated(90) as launches:
            ours.grouped_adapter(*args[:6], *ids(), args[6], False)
        assert launches[0].stats.ctas == 3 * blocks * 2, launches[0].stats.ctas
