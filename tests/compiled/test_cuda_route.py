"""route of csrc/, compiled and emulated: numbers, rules, ties, hostile schedules, barriers before atomics, bits."""

from __future__ import annotations

import re

import pytest
import torch

from mixpert_kernels.backends.cuda import route
from mixpert_kernels.backends.reference import route as plain
from mixpert_kernels.routing import counting_sort
from mixpert_kernels.testing import assert_as_accurate

from ._emulate_cuda import emulated, modules, ptx
from ._worker import full

EPS = 1e-5
RAGGED = [0, 0, 1, 2, 2], [1, 2, 3]  # image_of_tile, base_tile
HOSTILE = {"quantum": 3, "split": 0.9}  # a missing barrier shows under no gentler schedule
SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def problem(tokens, width, experts, hidden=None, dtype=torch.float32, tiles=5):
    """x and the router's six parameters."""
    generator = torch.Generator().manual_seed(width)

    def rand(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (t * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).to(dtype)

    x = torch.randn(tiles, tokens, width, generator=generator, dtype=torch.float64)
    mlp = (None, None) if hidden is None else (rand(hidden, width), rand(hidden))
    last = rand(experts, hidden or width) * 3, rand(experts)
    x = (x + 2 * x.mean(1, keepdim=True)).to(dtype)  # images differ
    return x, [rand(width), rand(width), *mlp, *last]


RULE = ("score_difference", 0.1, "runner_up")


def run(backend, x, weights, expert=None, ragged=True, rule=RULE):
    """scores, pooled, expert, order, offsets."""
    tiles = [torch.tensor(t) for t in RAGGED] if ragged else (None, None)
    return backend.route(x, None, *tiles, expert, *weights, EPS, *rule)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check_decision(got, of_image, rule, experts, expert=None):
    """expert, order and offsets are those that the scores, or the forced routes, say."""
    chosen = plain.decide(got[0], *rule) if expert is None else expert
    for ids, wanted in zip(got[2:], counting_sort(chosen[of_image], experts), strict=True):
        assert ids.dtype == torch.int32 and torch.equal(ids, wanted), (ids, wanted)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
@pytest.mark.parametrize("floats", [False, True], ids=["", "router in float32"])
@pytest.mark.parametrize(
    "dtype, tokens, width, experts, hidden",
    [
        (torch.bfloat16, 17, 72, 3, None),
        (torch.float16, 70, 72, 9, 40),
        (torch.float32, 33, 136, 4, None),
        (torch.bfloat16, 1, 9, 1, 5),
        pytest.param(torch.float32, 40, 136, 64, 24, marks=full),
        pytest.param(torch.float16, 40, 2104, 3, None, marks=full),  # beyond shared memory
        pytest.param(torch.bfloat16, 729, 1152, 4, None, marks=full),
    ],
    ids=str,
)
def test_scores_and_decisions(arch, dtype, tokens, width, experts, hidden, floats):
    x, weights = problem(tokens, width, experts, hidden, dtype)
    if floats:
        weights = [None if w is None else w.float() for w in weights]
    with emulated(arch=arch, resident_ctas=3) as launches:
        got = run(route, x, weights)
    assert [kernel for kernel, _ in launches] == [f"route_{SUFFIX[dtype]}"]
    wanted, truth = run(plain, x, weights), run(plain, x.double(), double(weights))
    assert_as_accurate("scores", got[0], wanted[0], truth[0])
    assert_as_accurate("pooled", got[1], wanted[1], truth[1])
    check_decision(got, torch.tensor(RAGGED[0]), RULE, experts)


# Logits that the bias alone makes: the features' part is zero.
SCORES = {
    "all equal": [0.0, 0.0, 0.0, 0.0],
    "the best one twice": [0.0, 3.0, 1.0, 3.0],
    "a clear one": [0.0, 1.0, 6.0, 2.0],
    "a narrow one": [0.0, 0.1, 0.3, 0.2],
    "the versatile one": [5.0, 1.0, 1.0, 0.0],
    "not a number": [0.0, float("nan"), 3.0, 1.0],
    "infinite": [0.0, 1.0, float("inf"), 1.0],
    "minus infinity": [0.0, 1.0, float("-inf"), 4.0],
}
RULES = [
    ("direct", 0.0, "runner_up"),
    ("score_threshold", 0.5, "runner_up"),
    ("score_difference", 0.0, "runner_up"),
    ("score_difference", 0.1, "runner_up"),
    ("score_difference", 0.3, "versatile"),
    ("score_difference", 1.0, "runner_up"),
]


@pytest.mark.parametrize("experts", [4, pytest.param(40, marks=full)])
def test_every_rule_ties_and_non_finite_scores(experts):
    """Forty experts: more than a warp has lanes; the first ones' scores come again at the end."""
    x, weights = problem(3, 8, experts, tiles=1)
    weights[4].zero_()
    with emulated():
        for name, bias in SCORES.items():
            weights[5] = torch.full((experts,), -1.0)
            weights[5][:4] = weights[5][-4:] = torch.tensor(bias)
            for rule in RULES:
                got = run(route, x, weights, ragged=False, rule=rule)
                wanted = run(plain, x, weights, ragged=False, rule=rule)
                assert torch.equal(got[2], wanted[2]), (name, rule, got[0], got[2], wanted[2])
                assert torch.equal(got[0].isfinite(), wanted[0].isfinite()), (name, rule)


@pytest.mark.parametrize("experts", range(1, 8))
def test_experts_without_images_and_forced_routes(experts):
    x, weights = problem(9, 24, experts, dtype=torch.bfloat16)
    forced = torch.tensor(
        [experts - 1, 0, experts - 1], dtype=(torch.int32, torch.int64)[experts % 2]
    )
    with emulated():
        got = run(route, x, weights)
        told = run(route, x, weights, forced)
    check_decision(got, torch.tensor(RAGGED[0]), RULE, experts)
    check_decision(told, torch.tensor(RAGGED[0]), RULE, experts, forced)
    assert torch.equal(got[0], told[0]), "forced routes have their scores"


@pytest.mark.parametrize("batch", [70, pytest.param(200, marks=full)])
def test_the_sort_of_more_tiles_than_a_warp_has_lanes(batch):
    x, weights = problem(1, 8, 5, dtype=torch.float16, tiles=batch)
    weights[5].zero_()
    generator = torch.Generator().manual_seed(0)
    last = (torch.rand(batch, generator=generator) < 0.3).long().cumsum(0)
    of_image = last - last[0]
    base = torch.searchsorted(of_image, torch.arange(int(of_image[-1]) + 1))
    rule = ("direct", 0.0, "runner_up")
    with emulated(resident_ctas=64):
        got = route.route(x, None, of_image, base, None, *weights, EPS, *rule)
    assert got[2].unique().numel() > 3, "a test of sorting needs several experts"
    check_decision(got, of_image, rule, 5)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full)])
@pytest.mark.parametrize("resident_ctas", [1, 2, 64])
@pytest.mark.parametrize("interleave", ["random", "warp"])
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 20), marks=full)], ids=str)
def test_hostile_schedules_change_no_bit(arch, resident_ctas, interleave, seeds):
    x, weights = problem(40, 73, 3, 6, torch.float16)  # columns for three warps
    with emulated(arch=arch):
        wanted = run(route, x, weights)
    options = {"resident_ctas": resident_ctas, "interleave": interleave, **HOSTILE}
    for seed in seeds:
        with emulated(arch=arch, seed=seed, **options):
            got = run(route, x, weights)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), f"seed {seed}"


def barriers(text):
    """For each release: whether a barrier comes after the last store to global memory before it."""
    found, safe = [], False
    for line in text.splitlines():
        if re.search(r"^\s+(@\S+ )?(st\.global|st\.[a-z])", line) and "st.shared" not in line:
            safe = False
        elif re.search(r"\bbar(rier)?\.(cta\.)?sync", line):
            safe = True
        elif re.search(r"\b(atom|red|st)\.(acq_rel|release)", line):
            found.append(safe)
    return found


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", SUFFIX.values())
def test_a_barrier_stands_between_the_stores_and_each_release(arch, dtype):
    text = ptx(modules(arch)[f"route_{dtype}"], arch)
    assert barriers(text) == [True, True], "arrival of a row block, of an image"
    assert "ld.global.nc" not in text, "a load that may see what was there before the launch"


@pytest.mark.parametrize("width", [9, 24])
def test_bits_depend_neither_on_the_batch_nor_on_where_a_tile_lies(width):
    x, weights = problem(40, width, 5, 6, torch.float16)
    with emulated():
        whole = run(route, x, weights, ragged=False)
        for b in (1, 4):
            alone = run(route, x[b : b + 1], weights, ragged=False)
            among = torch.zeros(1, 43, width + 5, dtype=x.dtype)
            among[0, 3:, 3 : 3 + width] = x[b]
            moved = run(route, among[:, 3:, 3 : 3 + width], weights, ragged=False)
            for one, other, all_of_them in zip(alone[:3], moved[:3], whole[:3], strict=True):
                assert torch.equal(one[0], all_of_them[b]), b
                assert torch.equal(other[0], all_of_them[b]), b


@pytest.mark.parametrize("hidden", [None, 6])
def test_gradients(hidden):
    x, weights = problem(17, 24, 3, hidden, torch.bfloat16)
    wanted, truth = run(plain, x, weights), run(plain, x.double(), double(weights))
    generator = torch.Generator().manual_seed(1)
    dscores, dpooled = (torch.randn(t.shape, generator=generator) for t in wanted[:2])

    def gradients(backend, x, weights, scores, pooled):
        given = (t.to(scores.dtype) for t in (dscores, dpooled / 10))
        rest = (*weights[:5], scores, pooled, EPS, True)
        return backend.route_backward(*given, x, None, torch.tensor(RAGGED[1]), *rest)

    with emulated():
        got = gradients(route, x, weights, *wanted[:2])
    usual = gradients(
        plain, x.float(), [None if w is None else w.float() for w in weights], *wanted[:2]
    )
    exact = gradients(plain, x.double(), double(weights), *truth[:2])
    for i, (g, w, t) in enumerate(zip(got, usual, exact, strict=True)):
        assert_as_accurate(f"gradient {i}", g, w.to(g.dtype), t)
    assert got[0][[0, 4]].eq(0).all(), "tiles that are the base of no image"
