"""grouped_outer of the CUDA backend, emulated: the gradients of experts' weights."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends.cuda.grouped_outer import grouped_outer

from ._cases import DTYPES, EXPERTS, check, ids, normal, to
from ._emulate_cuda import emulated
from ._worker import full

SIZES = ("large", "small")  # of a block
EXPERT = (2, 0, 2, 2, 0)  # experts 1 and 3 have no tile


def reference(dz, x, widths, expert):
    """The sums, tile by tile; in float64 exact enough to be the truth."""
    total = x.new_zeros(EXPERTS, dz.shape[2], x.shape[2])
    for dz_b, x_b, e in zip(dz, x, expert, strict=True):
        total.index_add_(0, torch.tensor([e]), (dz_b.T @ x_b)[None])
    return list(total.split(widths, 1))


def problem(tokens, depth, widths, expert=EXPERT):
    batch = len(expert)
    dz, x = normal(batch, tokens, sum(widths), seed=1), normal(batch, tokens, depth, seed=2)
    return [dz, x, list(widths), expert]


def run_on(arch=80, dtype=None, **options):
    """The host function, emulated on a chip; dtype: of the gradients, that of the features by default."""

    def run(seed, dz, x, widths, expert):
        _, order, offsets = Routing.forced(torch.tensor(expert, dtype=torch.int32), EXPERTS)[:3]
        with emulated(arch, seed=seed, **options):
            return grouped_outer(dz, x, widths, order, offsets, EXPERTS, dtype or x.dtype)

    return run


@pytest.mark.parametrize(
    "size, dtype",
    [
        pytest.param(size, dtype, marks=() if (i + j) % 2 == 0 else full)
        for i, size in enumerate(SIZES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_odd_sizes(size, dtype):
    check(run_on(choose=size), reference, problem(17, 72, (136, 8, 40)), dtype)


@pytest.mark.parametrize(
    "depth, widths", [(3, (5, 9, 2, 1)), (40, (71,)), (3, (1,)), (40, (24, 24, 24, 24))], ids=str
)
def test_rows_off_16_bytes_and_many_weights(depth, widths):
    check(run_on(), reference, problem(9, depth, widths), torch.bfloat16)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
@pytest.mark.parametrize("tokens", [1, 31, 33, 64, 145, 225])
def test_tokens(tokens, arch):
    """One block of tokens or several, whole or not; several tiles an expert."""
    check(run_on(arch), reference, problem(tokens, 24, (40,)), torch.float16)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_over_both_sides(size):
    check(run_on(choose=size), reference, problem(33, 208, (136, 136), (1, 1)), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_added_in_batch_order(size, dtype):
    """Tiles of whole blocks of tokens are added like one long tile: bit for bit, in their order in the batch."""
    dz, x, widths, _ = to(dtype, problem(64, 24, (40,)))
    run = run_on(dtype=torch.float32, choose=size)  # in which nothing is rounded away
    (mixed,) = run(0, dz, x, widths, EXPERT)
    for e in (0, 2):
        own = [b for b in range(len(EXPERT)) if EXPERT[b] == e]
        (alone,) = run(1, dz[own], x[own], widths, [e] * len(own))
        assert torch.equal(mixed[e], alone[e]), f"expert {e} alone"
        (long,) = run(2, dz[own].flatten(0, 1)[None], x[own].flatten(0, 1)[None], widths, [e])
        assert torch.equal(mixed[e], long[e]), f"expert {e} as one long tile"
        backwards = own[::-1]
        (other,) = run(0, dz[backwards], x[backwards], widths, [e] * len(own))
        assert not torch.equal(mixed[e], other[e]), "the order shows in the bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_without_tiles_have_exact_zeros(dtype):
    for expert in ((3,), (0, 0), ()):
        dz, x, widths, _ = to(dtype, problem(17, 24, (40, 8), expert or (0,)))
        (one, two) = run_on()(0, dz[: len(expert)], x[: len(expert)], widths, expert)
        for e in range(EXPERTS):
            assert one[e].any() == two[e].any() == (e in expert), (expert, e)


@pytest.mark.parametrize("size", SIZES)
def test_nan_spoils_its_expert_alone(size):
    dz, x, widths, _ = to(torch.bfloat16, problem(17, 24, (40,)))
    (clean,) = run_on(choose=size)(0, dz, x, widths, EXPERT)
    for tensor in (dz, x):
        kept = tensor[1].clone()
        tensor[1] = float("nan")
        (got,) = run_on(choose=size)(0, dz, x, widths, EXPERT)
        tensor[1] = kept
        assert torch.equal(got[1:], clean[1:]) and got[0].isnan().all()


@pytest.mark.parametrize("widths", [(136,), (40, 24), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_gradients_are_added_to_a_main_gradient(dtype, widths):
    dz, x, widths, _ = to(dtype, problem(17, 72, widths))
    _, order, offsets, _ = ids(EXPERT)
    main = [normal(EXPERTS, width, 72).float() for width in widths]
    with emulated():
        plain = grouped_outer(dz, x, widths, order, offsets, EXPERTS, torch.float32)
        out = [m.clone() for m in main]
        grouped_outer(dz, x, widths, order, offsets, EXPERTS, torch.float32, out, True)
    for got, before, added in zip(out, main, plain, strict=True):
        assert torch.equal(got, before + added), "one rounding of the sum"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", SIZES)
def test_loads_fill_their_sectors_and_no_banks_conflict(size, arch):
    dz, x, widths, expert = to(torch.bfloat16, problem(128, 128, (128,), (0, 1, 0)))
    _, order, offsets, _ = ids(expert)
    with emulated(arch, choose=size) as launches:
        grouped_outer(dz, x, widths, order, offsets, EXPERTS, dz.dtype)
    ((kernel, stats),) = launches
    assert stats.bank_conflicts == 0, (kernel, stats.bank_conflicts)
    assert stats.load_efficiency >= 0.95, stats.load_efficiency
    assert stats.store_efficiency >= 0.95, stats.store_efficiency
    assert stats.mma_flops == 3 * 2 * 128**3, stats.mma_flops


@full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", SIZES)
def test_everything(size, arch, dtype):
    check(run_on(arch, choose=size), reference, problem(145, 208, (192, 136)), dtype)
