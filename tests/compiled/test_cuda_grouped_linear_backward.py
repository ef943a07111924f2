"""The CUDA backward of grouped_linear and grouped_mlp, emulated: dX with act' in its epilogue, dz, sums by expert."""

from __future__ import annotations

import itertools

import pytest
import torch

from mixpert_kernels.backends.cuda._backward import grouped_linear_backward, grouped_mlp_backward
from mixpert_kernels.backends.cuda._reduce import backward_parts, sums_by_expert
from mixpert_kernels.backends.reference import grouped_linear as reference
from mixpert_kernels.backends.reference import grouped_mlp as reference_mlp
from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from ._cases import DTYPES, EXPERT, EXPERTS, check, ids, normal, to
from ._emulate_cuda import emulated, kernels
from ._worker import full

BF16 = torch.bfloat16
SIZES = ("large", "small")  # of a block
# The two kinds of gelu differ by less than bfloat16 shows.
TELLING = {a: torch.float32 if a.startswith("gelu") else BF16 for a in ACTIVATIONS}


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


def mlp_problem(tokens, depth, hidden, width, activation, scale, needs=None):
    """Arguments of grouped_mlp_backward."""
    batch = len(EXPERT)
    dy, x = normal(batch, tokens, width, seed=1), normal(batch, tokens, depth, seed=2)
    weight1 = normal(EXPERTS, hidden, depth, seed=3) * hidden**-0.5
    weight2 = normal(EXPERTS, width, hidden, seed=4) * width**-0.5
    bias1, bias2 = normal(EXPERTS, hidden, seed=5), normal(EXPERTS, width, seed=6)
    pre1 = normal(batch, tokens, hidden, seed=7)
    pre2 = normal(batch, tokens, width, seed=8) if scale else torch.empty(0)
    factor = normal(EXPERTS, width, seed=9) if scale else None
    needs = needs or [True] * 5 + [scale]
    parameters = [weight1, bias1, weight2, bias2]
    return [dy, x, *parameters, pre1, pre2, *ids(), activation, factor, needs]


def run_on(arch=80, function=grouped_linear_backward, **options):
    """The host function, emulated on a chip."""

    def run(seed, *args):
        with emulated(arch, seed=seed, **options):
            return function(*args)

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
    args = problem(17, 72, 72, count=3, activation="gelu_tanh", scale=True)
    check(run_on(choose=size), reference.grouped_linear_backward, args, dtype)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float32, marks=full)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_weights_that_are_read_where_they_are(size, dtype):
    """Of a width that tiles divide, with rounds of whole tiles between the changes from one weight to the next."""
    args = problem(17, 24, 256, count=3)
    args[-1] = [True, False, False, False]
    args[2] = [torch.cat([w, w], 2)[..., :24] for w in args[2]]  # rows further apart than long
    check(run_on(choose=size), reference.grouped_linear_backward, args, dtype)


@pytest.mark.parametrize("size", ["large", pytest.param("small", marks=full)])
def test_tails_like_4304(size):
    """4304 = 33 * 128 + 80 = 67 * 64 + 16; tokens and columns over several blocks."""
    args = problem(145, 64 * 3 + 16, 128 + 80)
    check(run_on(choose=size), reference.grouped_linear_backward, args, BF16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    args = problem(17, 40, 72, activation=activation, scale=activation == "relu")
    check(run_on(90), reference.grouped_linear_backward, args, TELLING[activation])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_the_epilogue_of_dx(activation):
    args = mlp_problem(17, 24, 40, 16, activation, scale=activation == "gelu")
    run = run_on(function=grouped_mlp_backward)
    check(run, reference_mlp.grouped_mlp_backward, args, TELLING[activation])


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_rows_off_16_bytes(dtype):
    args = problem(9, 71, 5, count=2, activation="gelu", scale=True)
    check(run_on(), reference.grouped_linear_backward, args, dtype)
    args = mlp_problem(9, 13, 11, 7, "relu", scale=False)
    run = run_on(function=grouped_mlp_backward)
    check(run, reference_mlp.grouped_mlp_backward, args, dtype)


def test_weights_of_different_widths():
    args = problem(17, 40, 1)
    widths = (72, 8, 24, 16)
    args[2] = [normal(EXPERTS, width, 40, seed=width) for width in widths]
    args[3] = [normal(EXPERTS, width, seed=width) for width in widths]
    args[0] = normal(len(EXPERT), 17, sum(widths), seed=22)
    check(run_on(), reference.grouped_linear_backward, args, BF16)


def test_what_is_not_needed_is_not_computed():
    args = to(BF16, problem(9, 24, 16, activation="gelu", scale=True))
    with emulated():
        everything = grouped_linear_backward(*args)
    for needs in itertools.product((False, True), repeat=4):
        with emulated() as launches:
            some = grouped_linear_backward(*args[:-1], list(needs))
        names = " ".join(kernel for kernel, _ in launches)
        assert ("grouped_linear_backward" in names) == needs[0], names
        assert ("grouped_outer" in names) == needs[1], names
        assert ("sum_by_expert" in names) == (needs[2] or needs[3]), names
        assert len(launches) <= 4, names
        for needed, got, all_of_it in zip(needs, some, everything, strict=True):
            got, all_of_it = ([t] if isinstance(t, torch.Tensor) else t for t in (got, all_of_it))
            wanted = [torch.equal(*pair) for pair in zip(got, all_of_it, strict=False)]
            assert all(wanted) if needed else all(t.numel() == 0 for t in got), needs


def test_what_the_mlp_does_not_need_is_not_computed():
    args = to(BF16, mlp_problem(9, 24, 16, 8, "gelu", scale=True))
    with emulated():
        everything = grouped_mlp_backward(*args)
    for i in range(6):
        needs = [j == i for j in range(6)]
        with emulated():
            some = grouped_mlp_backward(*args[:-1], needs)
        for j, (got, all_of_it) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(got, all_of_it) if j == i else got.numel() == 0, (i, j)


@pytest.mark.parametrize("size", ["large", pytest.param("small", marks=full)])
def test_bits_depend_on_an_experts_own_tiles_alone(size):
    """dX of a tile alone, and the gradients of an expert from its own tiles, whatever else is in the batch."""
    args = [to(BF16, value) for value in problem(17, 72, 136, activation="gelu")]
    dy, x, weights, biases, pre, *_ = args

    def run(tiles, seed):
        rows = list(tiles)
        chosen = ids([EXPERT[b] for b in tiles])
        call = (dy[rows], x[rows], weights, biases, pre[rows], *chosen, "gelu", None, args[-1])
        return run_on(choose=size, resident_ctas=1 + seed)(seed, *call)

    dx, (dweight,), (dbias,), _ = run((0, 1, 2), 0)
    assert not dweight[[1, 3]].any() and not dbias[[1, 3]].any(), "an expert without a tile"
    for b in range(3):
        assert torch.equal(run((b,), b)[0][0], dx[b]), f"dx of tile {b} alone"
    permuted, *_ = run((2, 1, 0), 1)
    assert torch.equal(permuted, dx[[2, 1, 0]]), "dx permuted"
    _, (own,), (own_bias,), _ = run((0, 2), 2)
    assert torch.equal(own[2], dweight[2]) and torch.equal(own_bias[2], dbias[2]), "expert 2 alone"


def test_all_sizes_of_block_give_the_same_bits():
    args = to(BF16, problem(33, 72, 136, count=2))
    results = []
    for size in SIZES:
        with emulated(choose=size) as launches:
            results.append(grouped_linear_backward(*args))
        assert all(size in kernel for kernel, stats in launches if stats.mma_flops), launches
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sums_take_an_experts_chunks_in_order():
    """By hand: a list of chunks, of which a warp adds every eighth; then the warps."""
    parts = normal(3, 13, 40).float()
    for dtype in DTYPES:
        with emulated():
            first, second = sums_by_expert(parts, [36, 4], *ids()[1:3], EXPERTS, dtype)
        together = torch.cat([first, second], 1)
        assert not together[[1, 3]].any(), "an expert without a tile"
        warps = kernels(80)["sum_by_expert_bf16"].constants["threads"] // 32
        for e in (0, 2):
            rows = torch.cat([parts[b] for b in range(3) if EXPERT[b] == e])  # (S * tiles, C)
            sums = torch.zeros(warps, 40)
            for r, row in enumerate(rows):
                sums[r % warps] += row
            total = torch.zeros(40)
            for one in sums:
                total += one
            assert torch.equal(together[e], total.to(dtype)), e


def test_dz_is_summed_before_it_is_rounded():
    """By hand: (1 + 1/128) squared needs more bits than bfloat16 has, and 64 of them are exact in float32."""
    dy, scale = (torch.full(shape, 1 + 1 / 128, dtype=BF16) for shape in ((1, 64, 8), (1, 8)))
    with emulated():
        dz, parts = backward_parts(dy, None, scale, ids([0], 1)[0], "none", True, False)
    assert (dz == 1 + 1 / 64).all() and (parts == 64 * (1 + 1 / 128) ** 2).all(), parts


def test_nan_stays_in_its_tile_and_its_expert():
    """Of two neighbours in memory, the one after and the one before a tile of another expert."""
    args = to(BF16, problem(17, 72, 136, activation="gelu", scale=True))
    dy, x, *_ = args
    clean = run_on()(0, *args)
    for tensor in (dy, x):
        kept = tensor[1].clone()
        tensor[1] = float("nan")
        dx, (dweight,), (dbias,), dscale = run_on()(1, *args)
        tensor[1] = kept
        assert torch.equal(dx[[0, 2]], clean[0][[0, 2]])
        assert torch.equal(dweight[1:], clean[1][0][1:]) and dweight[0].isnan().all()
        assert torch.equal(dbias[1:], clean[2][0][1:]) and torch.equal(dscale[1:], clean[3][1:])


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
@pytest.mark.parametrize("size", SIZES)
def test_loads_fill_their_sectors_and_no_banks_conflict(size, arch):
    args = to(BF16, problem(128, 128, 128, activation="gelu", scale=True))
    with emulated(arch, choose=size) as launches:
        grouped_linear_backward(*args)
    for kernel, stats in launches:
        assert stats.bank_conflicts == 0, (kernel, stats.bank_conflicts)
        if stats.mma_flops:
            assert stats.load_efficiency >= 0.95, (kernel, stats.load_efficiency)
            assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)
            # Each of three tiles of 128 tokens, 128 x 128; nothing is computed twice.
            assert stats.mma_flops == 3 * 2 * 128**3, (kernel, stats.mma_flops)


@full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", SIZES)
def test_everything(size, arch, dtype, activation):
    args = problem(145, 208, 192, count=2, activation=activation, scale=True)
    check(run_on(arch, choose=size), reference.grouped_linear_backward, args, dtype)
    args = mlp_problem(145, 72, 208, 136, activation, True)
    run = run_on(arch, grouped_mlp_backward, choose=size)
    check(run, reference_mlp.grouped_mlp_backward, args, dtype)
