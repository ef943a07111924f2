"""The Triton route, interpreted, beyond what every backend is tested for: sizes, sort, crops, bits, addresses."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

from mixpert_kernels.backends import why_not
from mixpert_kernels.backends.reference import route as plain
from mixpert_kernels.routing import counting_sort
from mixpert_kernels.testing import assert_as_accurate

REASON = why_not("route", "triton", device="cpu", dtype=torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mixpert_kernels.backends.triton import _launch  # noqa: E402
from mixpert_kernels.backends.triton import route as ours  # noqa: E402
from mixpert_kernels.backends.triton._route import decide, sort_tiles  # noqa: E402

DTYPES = (torch.float32, torch.float16)
RULES = {
    "direct": ("direct", "runner_up"),
    "threshold": ("score_threshold", "runner_up"),
    "runner_up": ("score_difference", "runner_up"),
    "versatile": ("score_difference", "versatile"),
}
EPS = 1e-5
NAN, INF = math.nan, math.inf
NORESERVE = 0x4000  # Linux: address space without memory behind it, until it is written
NAMES = ("dx", "dnorm_weight", "dnorm_bias", "dhidden_weight", "dhidden_bias", "dweight", "dbias")


def problem(batch, tokens, width, experts, hidden=None, dtype=torch.float32, seed=0):
    """x and the router's six parameters."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (t * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).to(dtype)

    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    mlp = (None, None) if hidden is None else (rand(hidden, width), rand(hidden))
    last = rand(experts, hidden or width) * 3, rand(experts)
    x = (x + 2 * x.mean(1, keepdim=True)).to(dtype)  # images differ
    return x, [rand(width), rand(width), *mlp, *last]


def run(backend, x, weights, rule="direct", threshold=0.1, tiles=(None, None), expert=None):
    """scores, pooled, expert, order, offsets."""
    strategy, against = RULES[rule]
    return backend.route(x, None, *tiles, expert, *weights, EPS, strategy, threshold, against)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check_ids(got, chosen, experts):
    for name, ids, wanted in zip(
        ("expert", "order", "offsets"), got[2:], counting_sort(chosen, experts), strict=True
    ):
        assert ids.dtype == torch.int32 and torch.equal(ids, wanted), name


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, in order, and how often memory was set."""
    names, launch = [], _launch.launch

    def count(kernel, grid, args, config):
        names.append(kernel.fn.__name__)
        launch(kernel, grid, args, config)

    monkeypatch.setattr(_launch, "launch", count)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [None, 40])
@pytest.mark.parametrize(
    "batch, tokens, width",
    [(4, 1, 72), (5, 17, 72), (3, 32, 5), (2, 33, 1), (2, 729, 1152), (1, 8, 2056)],
)
def test_scores_and_decisions(batch, tokens, width, hidden, dtype, launched):
    x, weights = problem(batch, tokens, width, 4, hidden, dtype)
    got = run(ours, x, weights, "runner_up")
    assert launched == ["_route_kernel"]
    wanted = run(plain, x, weights, "runner_up")
    truth = run(plain, x.double(), double(weights), "runner_up")
    draws = []  # for a few images have a few scores
    for seed in range(1, 9):
        other, _ = problem(batch, tokens, width, 4, hidden, dtype, seed)
        others = run(plain, other, weights), run(plain, other.double(), double(weights))
        draws.append(list(zip(*others, strict=True))[:2])
    for name, *tensors, more in zip(
        ("scores", "pooled"), got, wanted, truth, zip(*draws, strict=True), strict=False
    ):
        assert_as_accurate(name, *tensors, draws=more)
    check_ids(got, plain.decide(got[0], "score_difference", 0.1, "runner_up"), 4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("experts", [*range(1, 10), 64])
def test_every_number_of_experts_and_every_strategy(experts, rule):
    x, weights = problem(12, 3, 20, experts)
    got = run(ours, x, weights, rule, 0.3)
    wanted = run(plain, x, weights, rule, 0.3)
    truth = run(plain, x.double(), double(weights), rule, 0.3)
    assert_as_accurate("scores", got[0], wanted[0], truth[0])
    check_ids(got, plain.decide(got[0], RULES[rule][0], 0.3, RULES[rule][1]), experts)
    assert experts == 1 or 1 < len(got[2].unique()) < 12


@triton.jit
def _decide_kernel(
    scores_ptr, expert_ptr, threshold, RULE: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):
    i, e = tl.program_id(0), tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + i * E + e, mask=e < E, other=0.0)
    tl.store(expert_ptr + i, decide(scores, threshold, RULE, E, BLOCK))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("experts", [1, 3, 4, 9])
def test_decisions_on_ties_thresholds_and_scores_that_are_not_finite(experts, rule):
    generator = torch.Generator().manual_seed(experts)
    # Eighths are exact, so that ties and equalities occur.
    scores = torch.randint(0, 9, (60, experts), generator=generator) / 8
    for start, bad in enumerate((NAN, INF, -INF)):
        scores[start::10, start % experts] = bad
    for threshold in (0.0, 0.25, 0.5, 1.0):
        got = torch.empty(60, dtype=torch.int32)
        block = triton.next_power_of_2(experts)
        _decide_kernel[(60,)](scores, got, threshold, rule, experts, block)
        assert torch.equal(
            got.long(), plain.decide(scores, RULES[rule][0], threshold, RULES[rule][1])
        )


@triton.jit
def _sort_kernel(
    ids_ptr,
    tiles_ptr,
    expert_ptr,
    order_ptr,
    offsets_ptr,
    batch,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sort_tiles(ids_ptr, tiles_ptr, expert_ptr, order_ptr, offsets_ptr, batch, E, BLOCK)


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize(
    "batch, experts",
    [(1, 1), (1, 7), (37, 4), (2048, 1), (2049, 3), (3001, 9), (300, 64), (70, 200)],
)
def test_the_sort(batch, experts, anyres):
    generator = torch.Generator().manual_seed(batch)
    chosen = torch.randint(0, experts, (batch,), generator=generator)
    image_of_tile, ids = None, chosen.int()
    if anyres:
        image_of_tile = torch.randint(0, (batch + 3) // 4, (batch,), generator=generator).sort()[0]
        chosen = chosen[image_of_tile]
    got = [torch.full((n,), -7, dtype=torch.int32) for n in (batch, batch, experts + 1)]
    block = triton.next_power_of_2(experts)
    _sort_kernel[(1,)](ids + 1, image_of_tile, *got, batch, experts, block)
    check_ids((None, None, *got), chosen, experts)


RAGGED = (
    [0, 0, 1, 2, 2, 2, 3, 3],
    [1, 2, 5, 6],
)  # image_of_tile, base_tile: first, only, last, first


@pytest.mark.parametrize("forced", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_crops_follow_their_image(ids, forced):
    x, weights = problem(8, 40, 24, 5, seed=3)
    tiles = [torch.tensor(t, dtype=ids) for t in RAGGED]
    expert = None if forced is None else torch.tensor([4, 0, 4, 2], dtype=forced)
    blind = x.clone()
    blind[[b for b in range(8) if b not in RAGGED[1]]] = NAN
    got = run(ours, blind, weights, tiles=tiles, expert=expert)
    alone = run(ours, x[RAGGED[1]], weights)
    assert torch.equal(got[0], alone[0]) and torch.equal(got[1], alone[1])
    chosen = alone[2] if expert is None else expert
    check_ids(got, chosen[tiles[0].long()], 5)


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_image_that_is_not_finite_goes_to_expert_0_and_touches_no_other(bad, hidden):
    x, weights = problem(5, 35, 12, 4, hidden)
    weights[-1][0] -= 20  # so that nobody goes to expert 0 of his own accord
    before = run(ours, x, weights)
    x[2, 34, 3] = bad
    after = run(ours, x, weights)
    others = [0, 1, 3, 4]
    assert before[2].all() and after[2][2] == 0 and not after[0][2].isfinite().all()
    for name, one, other in zip(("scores", "pooled", "expert"), before, after, strict=False):
        assert torch.equal(one[others], other[others]), name


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("tokens, width", [(17, 72), (70, 9), (1, 33)])
def test_an_image_is_bitwise_the_same_in_any_batch_and_order(tokens, width, hidden):
    x, weights = problem(6, tokens, width, 5, hidden, torch.float16)
    whole = run(ours, x, weights)
    order = [4, 1, 5, 0, 3, 2]
    permuted = run(ours, x[order], weights)
    for i in range(3):
        assert torch.equal(permuted[i], whole[i][order])
        for b in range(6):
            assert torch.equal(run(ours, x[b : b + 1], weights)[i][0], whole[i][b])


def gradients(backend, x, weights, tiles=(None, None), needs_x=True):
    scores, pooled, *_ = run(plain, x, weights, tiles=tiles)
    generator = torch.Generator().manual_seed(5)
    given = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (scores, pooled)
    ]
    dscores, dpooled = (t.to(scores.dtype) for t in given)
    rest = (*weights[:5], scores, pooled, EPS, needs_x)
    return backend.route_backward(dscores, dpooled / 10, x, None, tiles[1], *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [None, 40])
@pytest.mark.parametrize(
    "tokens, width, experts", [(1, 9, 1), (17, 72, 4), (40, 300, 9), (3, 1152, 64)]
)
def test_gradients(tokens, width, experts, hidden, dtype, launched):
    tiles = [torch.tensor(t) for t in RAGGED]
    plains = []  # of several draws, for a bias has few gradients
    for seed in range(5):
        x, weights = problem(8, tokens, width, experts, hidden, dtype, seed)
        # The router computes in float32 whatever its dtype: each gradient is rounded once.
        wide = [None if w is None else w.float() for w in weights]
        both = (x.float(), wide), (x.double(), double(weights))
        plains.append([gradients(plain, *args, tiles) for args in both])
    x, weights = problem(8, tokens, width, experts, hidden, dtype)
    got = gradients(ours, x, weights, tiles)
    assert len(launched) == 3
    for i, (name, g) in enumerate(zip(NAMES, got, strict=True)):
        pairs = [(wide[i].to(g.dtype), truth[i]) for wide, truth in plains]
        assert_as_accurate(name, g, *pairs[0], draws=pairs[1:])
        assert g.dtype == dtype
    others = [b for b in range(8) if b not in RAGGED[1]]
    assert got[0][others].eq(0).all() and got[0][RAGGED[1]].any()
    again = gradients(ours, x, weights, tiles)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("batch", [1, 20])
def test_gradients_without_those_of_the_features(batch, launched):
    x, weights = problem(batch, 5, 16, 3)
    got, wanted = gradients(ours, x, weights, needs_x=False), gradients(plain, x, weights)
    assert len(launched) == 2 and got[0].shape == (0,)
    torch.testing.assert_close(got[1:], wanted[1:])
    torch.testing.assert_close(gradients(ours, x, weights)[0], wanted[0])


def test_a_tile_that_is_the_base_of_two_images_has_the_sum_of_their_gradients():
    x, weights = problem(5, 3, 8, 4)
    tiles = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([4, 2, 1, 2])
    got, wanted = (gradients(backend, x, weights, tiles)[0] for backend in (ours, plain))
    torch.testing.assert_close(got, wanted)


def test_parameters_of_other_dtypes_and_layouts():
    x, weights = problem(4, 9, 24, 3, 6, torch.float16)
    weights = [w.float() if i % 2 else w for i, w in enumerate(weights)]
    weights[2], weights[4] = (w.T.contiguous().T for w in (weights[2], weights[4]))
    got = run(ours, x.transpose(0, 1).contiguous().transpose(0, 1), weights)
    torch.testing.assert_close(got, run(plain, x, weights))
    torch.testing.assert_close(
        run(ours, x.transpose(1, 2).contiguous().transpose(1, 2), weights), got
    )
    for name, grad, w in zip(NAMES[1:], gradients(ours, x, weights)[1:], weights, strict=True):
        assert name == "dbias" or grad.dtype == w.dtype, name


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no anonymous memory maps")
def test_offsets_have_64_bits():
    """Three small tiles, 2**30 elements apart."""
    x, weights = problem(3, 34, 72, 4, dtype=torch.float16)
    stride = 2**30 + 8
    room = mmap.mmap(-1, 2 * (2 * stride + x[0].numel()),
                     flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)  # fmt: skip
    spread = torch.frombuffer(room, dtype=torch.float16).as_strided(x.shape, (stride, 72, 1))
    spread.copy_(x)
    far, near = run(ours, spread, weights), run(ours, x, weights)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
