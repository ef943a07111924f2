"""The CUDA grouped_linear and grouped_mlp, emulated: both sizes of a block, whose bits must be the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from mixpert_kernels.backends.cuda import grouped_linear as cuda
from mixpert_kernels.backends.cuda import grouped_mlp as cuda_mlp
from mixpert_kernels.backends.reference import grouped_linear as reference
from mixpert_kernels.backends.reference import grouped_mlp as reference_mlp
from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from ._cases import DTYPES, EXPERT, EXPERTS, check, ids, normal, to
from ._emulate_cuda import emulated, kernels, modules, ptx
from ._worker import full

BF16 = torch.bfloat16
HALF = (torch.bfloat16, torch.float16)
SIZES = ("large", "small")  # of a block


def problem(
    tokens,
    depth,
    width,
    *,
    count=1,
    activation="none",
    residual=False,
    scale=False,
    bias=True,
    expert=EXPERT,
):
    """Arguments of the host function."""
    batch, columns = len(expert), count * width
    weights = [normal(EXPERTS, width, depth, seed=i) * depth**-0.5 for i in range(count)]
    biases = [normal(EXPERTS, width, seed=10 + i) for i in range(count)] if bias else []
    added = normal(batch, tokens, columns, seed=20) if residual else None
    factor = normal(EXPERTS, columns, seed=21) if scale else None
    x = normal(batch, tokens, depth, seed=22)
    return [x, weights, biases, *ids(expert), activation, added, factor, True]


def launched(size, seed, *args, arch=80, **options):
    """Results of the host function, and the counters of its launch."""
    with emulated(arch, choose=size, seed=seed, **options) as launches:
        results = cuda.grouped_linear(*args)
    (launch,) = launches
    assert size is None or launch.kernel.endswith(size), launch.kernel
    assert launch.stats.bank_conflicts == 0 and not launch.stats.notes, launch.stats
    return results, launch


def run(seed, *args, **options):
    """The host function; blocks of another size with another seed, which ``check`` asks to give the same bits."""
    return launched(SIZES[seed % 2], seed, *args, **options)[0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_odd_sizes(dtype):
    args = problem(
        17, 72, 136, count=3, activation="gelu_tanh", residual=True, scale=True, expert=(2, 0)
    )
    check(run, reference.grouped_linear, args, dtype)


def test_odd_sizes_in_float32():
    args = problem(17, 72, 40, count=2, activation="gelu", residual=True, scale=True, expert=(1, 0))
    check(run, reference.grouped_linear, args, torch.float32)


@pytest.mark.parametrize("size", SIZES)
def test_every_schedule(size):
    """Rounds without masks and with them, two thread blocks for all, each warp on its own."""
    args = problem(145, 64 * 5 + 16, 40, expert=(2,))

    def scheduled(seed, *given):
        options = {"interleave": "warp", "quantum": 30} if seed == 2 else {}
        return launched(size, seed, *given, multiprocessors=1 + seed % 2, **options)[0]

    check(scheduled, reference.grouped_linear, args, BF16)


def test_tails_like_4304():
    """4304 = 33 * 128 + 80 = 134 * 32 + 16; tokens and columns over several blocks."""
    args = problem(145, 64 * 3 + 16, 128 + 80, residual=True, expert=(2, 0))
    check(run, reference.grouped_linear, args, BF16)


def test_the_90a_code():
    args = problem(17, 72, 136, count=2, activation="gelu", residual=True, expert=(3,))

    def run_on_90(seed, *given):
        return run(seed, *given, arch=90)

    check(run_on_90, reference.grouped_linear, args, BF16)


@pytest.mark.parametrize("dtype", (BF16, torch.float32), ids=str)
@pytest.mark.parametrize("depth, width", [(71, 5), (1, 1), (64, 24)])
def test_rows_off_16_bytes(depth, width, dtype):
    args = problem(
        9, depth, width, count=2, activation="gelu", residual=True, scale=True, expert=(3, 0)
    )
    check(run, reference.grouped_linear, args, dtype)


def test_operands_off_16_bytes():
    """A pointer between multiples of 16 bytes, and rows that are not dense."""
    args = to(BF16, problem(9, 72, 40, residual=True, scale=True, expert=(1, 3)))
    expected = run(0, *args)[0]
    x, (weight,), (bias,), *rest = args

    def moved(tensor):
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    assert torch.equal(run(1, moved(x), [moved(weight)], [moved(bias)], *rest)[0], expected)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(1, columns, [weight], [bias], *rest)[0], expected)
    residual = rest[-3]
    rest[-3] = moved(residual)
    assert torch.equal(run(1, x, [weight], [bias], *rest)[0], expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation):
    """In float32 too: bfloat16 does not tell the two GELUs apart."""
    for residual, scale, dtype in (
        (False, False, torch.float32),
        (True, False, BF16),
        (False, True, BF16),
    ):
        args = problem(
            17, 32, 40, activation=activation, residual=residual, scale=scale, expert=(2,)
        )
        check(run, reference.grouped_linear, args, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_that_are_none_and_huge_ones(activation):
    args = to(torch.float32, problem(3, 16, 8, activation=activation, expert=(2,)))
    for row, value in enumerate((float("nan"), 1e30, -1e30)):
        args[0][0, row, 3] = value
    got, expected = run(1, *args)[0], reference.grouped_linear(*args)[0]
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_without_bias_and_pre():
    args = to(BF16, problem(17, 32, 40, activation="relu", bias=False, expert=(2,)))
    y, pre = run(0, *args)
    without, none = run(1, *args[:-1], False)
    assert torch.equal(y, without) and torch.equal(y, pre.relu()) and none.numel() == 0


def test_weights_of_half_the_width():
    """Half-precision parameters beside float32 features are computed in float32."""
    x, weights, biases, *rest = to(torch.float32, problem(9, 40, 24, expert=(2, 1)))
    weights, biases = to(torch.float16, weights), to(torch.float16, biases)
    got = run(1, x, weights, biases, *rest)[0]
    assert torch.equal(got, run(1, x, to(x.dtype, weights), to(x.dtype, biases), *rest)[0])


@pytest.mark.parametrize("size", SIZES)
def test_a_tile_is_the_same_alone_in_a_batch_and_in_any_order(size):
    args = to(BF16, problem(17, 40, 72, count=2, activation="gelu", residual=True))
    x, weights, biases, *_, activation, residual, scale, _ = args

    def of(tiles, seed):
        chosen = ids([EXPERT[b] for b in tiles])
        rows = list(tiles)
        call = (x[rows], weights, biases, *chosen, activation, residual[rows], scale, False)
        return launched(size, seed, *call, resident_ctas=1 + seed)[0][0]

    together = of((0, 1, 2), 0)
    assert torch.equal(of((2, 0, 1), 1), together[[2, 0, 1]]), "permuted"
    for b in range(3):
        assert torch.equal(of((b,), 2)[0], together[b]), f"tile {b} alone"


@pytest.mark.parametrize(
    "size, dtype", [*itertools.product(SIZES, (BF16,)), ("large", torch.float32)]
)
def test_memory_is_read_and_written_in_full_sectors(size, dtype):
    """Of a product of whole blocks every byte is asked for once; with an epilogue no sector is wasted."""
    depth = 64
    args = to(dtype, problem(128, depth, 128, bias=False, expert=(2,)))
    _, (kernel, stats) = launched(size, 0, *args)
    facts = kernels(80)[kernel].constants
    blocks = (128 // facts["block_m"]) * (128 // facts["block_n"])
    copied = blocks * (facts["block_m"] + facts["block_n"]) * depth * dtype.itemsize
    assert stats.cp_async_bytes == copied
    assert stats.load_efficiency >= 0.95 and stats.store_efficiency == 1, stats
    args = to(
        dtype, problem(128, depth, 128, activation="gelu", residual=True, scale=True, expert=(2,))
    )
    stats = launched(size, 0, *args)[1].stats
    assert stats.load_efficiency >= 0.95 and stats.store_efficiency == 1, stats


def test_lanes_meet_at_a_strip():
    """Before it is read and before it is written again; of lanes of one warp the emulator sees no race."""
    text = ptx(modules(80)["grouped_linear_bf16_large"], 80)
    for kernel in text.split(".visible .entry ")[1:]:
        assert kernel.count("bar.warp.sync") == 2, kernel.splitlines()[0]


def test_the_size_follows_from_how_many_blocks_there_are():
    args = to(BF16, problem(17, 32, 40))  # 3 blocks
    for multiprocessors, size in ((1, "large"), (3, "large"), (4, "small")):
        launch = launched(None, 0, *args, multiprocessors=multiprocessors)[1]
        assert launch.kernel.endswith(size), multiprocessors


def test_nothing_to_do():
    x, weights, biases, *_ = to(BF16, problem(9, 40, 24))
    with emulated(80) as launches:
        nothing = torch.empty(0, dtype=torch.int32)
        y, _ = cuda.grouped_linear(
            x[:0], weights, biases, nothing, nothing, nothing, None, "none", None, None, False
        )
    assert y.shape == (0, 9, 24) and not launches


def test_weights_that_differ_take_a_launch_each_run():
    """Side by side go those of one shape: 40, then 24 and 24."""
    args = problem(9, 40, 24, count=2, residual=False, expert=(1, 3))
    args[1].insert(0, normal(EXPERTS, 40, 40, seed=30))
    args[2].insert(0, normal(EXPERTS, 40, seed=31))
    args[-2] = normal(EXPERTS, 88, seed=32)  # scale

    def both(seed, *given):
        with emulated(80, seed=seed, choose=SIZES[seed % 2]) as launches:
            results = cuda.grouped_linear(*given)
        assert len(launches) == 2
        return results

    check(both, reference.grouped_linear, args, BF16)


def test_grouped_mlp():
    depth, hidden, width = 72, 136, 40
    args = [
        normal(2, 17, depth),
        normal(EXPERTS, hidden, depth, seed=1) * depth**-0.5,
        normal(EXPERTS, hidden, seed=2),
        normal(EXPERTS, width, hidden, seed=3) * hidden**-0.5,
        None,
        *ids((3, 0)),
        "gelu_tanh",
        normal(2, 17, width, seed=4),
        normal(EXPERTS, width, seed=5),
        True,
    ]

    def two(seed, *given):
        with emulated(80, seed=seed, choose=SIZES[seed % 2]) as launches:
            results = cuda_mlp.grouped_mlp(*given)
        assert len(launches) == 2
        return results

    check(two, reference_mlp.grouped_mlp, args, BF16)


@full
def test_tiles_far_apart():
    """By 2^31 numbers, of which few take memory."""
    args = to(BF16, problem(9, 40, 24, expert=(1, 3)))
    far = torch.zeros(2**31 + 9 * 40, dtype=BF16).as_strided((2, 9, 40), (2**31, 40, 1))
    far.copy_(args[0])
    for size in SIZES:
        got = launched(size, 0, far, *args[1:])[0][0]
        assert torch.equal(got, launched(size, 0, *args)[0][0]), size


@full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", (80, 90))
def test_everything(arch, dtype, activation):
    args = problem(145, 208, 208, count=2, activation=activation, residual=True, scale=True)
    for size in SIZES:

        def run_on(seed, *given, size=size):
            return launched(size, seed, *given, arch=arch)[0]

        check(run_on, reference.grouped_linear, args, dtype)
