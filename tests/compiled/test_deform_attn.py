"""deform_attn compiled for a GPU and emulated: accuracy, bits, launches, and how memory is read."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.backends.reference import deform_attn as plain
from mixpert_kernels.backends.triton import deform_attn as attn
from mixpert_kernels.grids import Grids
from mixpert_kernels.testing import assert_as_accurate

from ._cases import DTYPES, normal, to
from ._emulate import emulated
from ._worker import full

SIZES = [(3, 5), (1, 1), (9, 9), (1, 12)]  # 81 patches are two blocks of the fixed order's
NAMES = ("y", "dvalue", "doffsets", "dlogits", "dreference")
BACKWARD = "_deform_attn_backward_kernel"
FIXED = "_deform_attn_gather_kernel"


def problem(dtype, *, sizes=SIZES, queries=5, heads=2, points=2, d=96, far=2.0):
    """dy, value (a slice of all layers' values), offsets, logits, reference; of numbers that the dtype holds."""
    batch, rows = len(sizes), sum(h * w for h, w in sizes)
    layers = normal(rows, 2, heads, d)
    given = (
        normal(batch, queries, heads * d, seed=1),
        layers[:, 1],
        far * normal(batch, queries, heads, points, 2, seed=2),
        normal(batch, queries, heads, points, seed=3),
        0.5 + 0.4 * normal(queries, 2, seed=4),
    )
    return [to(dtype, t) for t in given]


def run(backend, tensors, sizes=SIZES, *, fixed=True, needs=(True,) * 4):
    dy, *tensors = tensors
    grids = Grids.of(sizes)
    y = backend.deform_attn(*tensors, *grids)
    grads = backend.deform_attn_backward(dy, *tensors, *grids, fixed, list(needs))
    return dict(zip(NAMES, (y, *grads), strict=True))


def check(got, tensors, sizes=SIZES, *, fixed=False):
    """As accurate as the definition in float32, rounded once.

    But for the product of three TF32 products that float32 is in the fixed order: what is left of an operand behind two
    times 11 bits is dropped, 2 ** -22 of each of the two.
    """
    usual = run(plain, [t.float() for t in tensors], sizes)
    truth = run(plain, [t.double() for t in tensors], sizes)
    for name in NAMES:
        if fixed and name == "dvalue" and got[name].dtype == torch.float32:
            error = (got[name].double() - truth[name]).norm() / truth[name].norm()
            assert error < 2**-21, error
            continue
        assert_as_accurate(name, got[name], usual[name].to(got[name].dtype), truth[name])


def usual(*cases):
    """These in every run, the others of the cross product where all are asked for."""
    dtypes, archs = DTYPES, (80, 90)
    every = [
        (d, t, a, f) for d in (96, 128, 40) for t in dtypes for a in archs for f in (True, False)
    ]
    return [case if case in cases else pytest.param(*case, marks=full) for case in every]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=full)])
@pytest.mark.parametrize(
    "d, dtype, arch, fixed",
    usual(
        (96, torch.bfloat16, 80, True),
        (96, torch.bfloat16, 90, False),
        (96, torch.float32, 90, True),
        (128, torch.float32, 80, False),
        (40, torch.float16, 90, True),
    ),
)
def test_is_as_accurate_as_plain_pytorch(d, dtype, arch, fixed, seed):
    tensors = problem(dtype, d=d)
    with emulated(arch=arch, seed=seed) as launches:
        got = run(attn, tensors, fixed=fixed)
    check(got, tensors, fixed=fixed)
    value = FIXED if fixed else "_deform_attn_value_kernel"
    wanted = ["_deform_attn_kernel", value, BACKWARD, "_deform_attn_reference_kernel"]
    assert [kernel for kernel, _ in launches] == wanted, launches


@pytest.mark.parametrize(
    "queries, heads, points, d, arch, fixed",
    [
        (1, 1, 1, 1, 80, True),
        (3, 3, 1, 7, 90, False),
        (9, 1, 3, 24, 90, False),
        (2, 2, 1, 136, 80, True),
    ],
)
def test_odd_sizes(queries, heads, points, d, arch, fixed):
    tensors = problem(torch.bfloat16, queries=queries, heads=heads, points=points, d=d)
    with emulated(arch=arch):
        got = run(attn, tensors, fixed=fixed)
    check(got, tensors)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
def test_many_queries(arch):
    """More than one block of queries in every kernel, and points so far out that whole blocks see nothing."""
    tensors = problem(torch.bfloat16, sizes=[(40, 2), (1, 3)], queries=70, heads=1, points=2, d=16)
    with emulated(arch=arch):
        got = run(attn, tensors, [(40, 2), (1, 3)])
    check(got, tensors, [(40, 2), (1, 3)])


def test_a_wide_image_costs_no_digits():
    """float32 positions of one rounding would be off by 1e-4 of a patch at the right end."""
    sizes = [(1, 2048), (700, 3)]
    tensors = problem(torch.float32, sizes=sizes, queries=40, heads=1, points=2, d=8)
    with emulated():
        got = run(attn, tensors, sizes, fixed=False)
    truth = run(plain, [t.double() for t in tensors], sizes)
    for name in NAMES:
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 2e-6, (name, error)


@pytest.mark.parametrize("dtype, arch", [(torch.bfloat16, 90), (torch.float32, 80)])
def test_an_image_is_bitwise_the_same_alone_and_under_any_schedule(dtype, arch):
    dy, value, offsets, logits, reference = problem(dtype)
    images = value.split([h * w for h, w in SIZES])
    with emulated(arch=arch, seed=1):
        whole = run(attn, (dy, value, offsets, logits, reference))
    rows = whole["dvalue"].split([h * w for h, w in SIZES])
    for order in ([2], [3, 2, 0]):
        part = (dy[order], torch.cat([images[b] for b in order]), offsets[order], logits[order])
        with emulated(arch=arch, seed=2):
            got = run(attn, (*part, reference), [SIZES[b] for b in order])
        for name in ("y", "doffsets", "dlogits"):
            assert torch.equal(got[name], whole[name][order]), (name, order)
        assert torch.equal(got["dvalue"], torch.cat([rows[b] for b in order])), order


@pytest.mark.parametrize("arch", [80, 90])
def test_what_a_thread_needs_it_computes_itself(arch):
    """No barrier, no shared memory, 16 bytes a load; on sm_90 also 16 bytes an atomic."""
    with emulated(arch=arch) as launches:
        run(attn, problem(torch.bfloat16, d=96), fixed=False)
    for kernel, stats in launches[:3]:
        ptx = stats.compiled.ptx
        assert "bar.sync" not in ptx and "ld.shared" not in ptx, kernel
        wide = ptx.count("ld.global.v4.b32")
        assert kernel == "_deform_attn_value_kernel" or wide >= 8, (kernel, wide)  # points * 4
    atomics = launches[1].stats.compiled.ptx.count("add.v4.f32")
    assert atomics == (8 if arch == 90 else 0), atomics


def test_only_what_is_needed_is_launched():
    tensors = problem(torch.bfloat16, d=16)
    for needs, kernels in (
        ((True, False, False, False), [FIXED]),
        ((False, True, False, False), [BACKWARD]),
    ):
        with emulated() as launches:
            got = run(attn, tensors, needs=needs)
        assert [kernel for kernel, _ in launches[1:]] == kernels, (needs, launches)
        assert [got[name].numel() > 0 for name in NAMES[1:]] == list(needs), needs
