"""route: pool, score, decide, sort, against a few lines of NumPy and hand-worked tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.backends.reference.route import decide
from mixpert_kernels.ops import RouterWeights, Strategy, route
from mixpert_kernels.testing import assert_as_accurate

HERE = [
    name for name in BACKENDS if why_not("route", name, device="cpu", dtype=torch.float32) is None
]
STRATEGIES = (
    ("direct", "runner_up"),
    ("score_threshold", "runner_up"),
    ("score_difference", "runner_up"),
    ("score_difference", "versatile"),
)
NAN, INF = math.nan, math.inf


def oracle_decision(scores, strategy, threshold, against):
    """One image, in plain Python."""
    if not all(math.isfinite(s) for s in scores):
        return 0
    best = scores.index(max(scores))
    if strategy == "direct":
        return best
    if strategy == "score_threshold":
        return best if scores[best] >= threshold else 0
    others = [s for e, s in enumerate(scores) if e != best]
    reference = scores[0] if against == "versatile" else max(others, default=-INF)
    return best if scores[best] - reference >= threshold else 0


def oracle_scores(x, weights, base_tile, eps):
    gamma, beta, hidden, hidden_bias, weight, bias = weights
    scores = []
    for tile in base_tile:
        z = x[tile].mean(0)
        z = (z - z.mean()) / np.sqrt(z.var() + eps) * gamma + beta
        if hidden is not None:
            z = hidden @ z + hidden_bias
            z = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in z])
        logits = weight @ z + bias
        p = np.exp(logits - logits.max())
        scores.append(p / p.sum())
    return np.stack(scores)


def router(width, experts, hidden=None, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (rows * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).to(dtype)

    mlp = (None, None) if hidden is None else (rand(hidden, width), rand(hidden))
    return RouterWeights(
        rand(width), rand(width), *mlp, rand(experts, hidden or width), rand(experts)
    )


def features(batch, tokens, width, *, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    return (x + 2 * x.mean(1, keepdim=True)).to(dtype)  # images differ


quarters = st.integers(0, 8).map(
    lambda n: n / 8
)  # exact in binary, so that ties and equalities occur


@given(
    rows=st.integers(1, 8).flatmap(
        lambda e: st.lists(
            st.lists(quarters | st.sampled_from((NAN, INF, -INF)), min_size=e, max_size=e),
            min_size=1,
            max_size=6,
        )
    ),
    strategy=st.sampled_from(STRATEGIES),
    threshold=quarters,
)
def test_decisions_equal_the_oracle(rows, strategy, threshold):
    name, against = strategy
    got = decide(torch.tensor(rows), name, threshold, against)
    assert got.tolist() == [oracle_decision(row, name, threshold, against) for row in rows]


# scores, direct, threshold 0.5, difference 0.25 to the runner-up, difference 0.25 to the versatile expert
TABLE = [
    ([0.25, 0.75, 0.00], 1, 1, 1, 1),
    ([0.25, 0.50, 0.25], 1, 1, 1, 1),  # equal to the threshold: it wins
    ([0.125, 0.4375, 0.4375], 1, 0, 0, 1),  # a tie: the lowest index
    ([0.00, 0.375, 0.625], 2, 2, 2, 2),
    ([0.375, 0.50, 0.125], 1, 1, 0, 0),
    ([0.50, 0.50, 0.00], 0, 0, 0, 0),
    ([0.25, 0.25, 0.25], 0, 0, 0, 0),
    ([0.25, 0.75, NAN], 0, 0, 0, 0),
    ([0.25, INF, 0.0], 0, 0, 0, 0),
    ([0.25, 0.5, -INF], 0, 0, 0, 0),
]


@pytest.mark.parametrize("column, strategy", list(enumerate(STRATEGIES)))
def test_decisions_by_hand(column, strategy):
    threshold = 0.5 if strategy[0] == "score_threshold" else 0.25
    got = decide(torch.tensor([row[0] for row in TABLE]), strategy[0], threshold, strategy[1])
    assert got.tolist() == [row[1 + column] for row in TABLE]


@pytest.mark.parametrize("against", ["runner_up", "versatile"])
def test_delta_0_is_direct_and_a_threshold_above_1_sends_all_to_expert_0(against):
    scores = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    scores[::4] = scores[::4].round(decimals=1)  # ties
    direct = decide(scores, "direct", 0.0, against)
    assert torch.equal(decide(scores, "score_difference", 0.0, against), direct)
    assert len(direct.unique()) == 5
    for strategy in ("score_threshold", "score_difference"):
        assert decide(scores, strategy, 1.01, against).eq(0).all()


@given(
    data=st.data(),
    tiles=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 5), st.integers(2, 6)),
    experts=st.integers(1, 8),
    hidden=st.none() | st.integers(1, 5),
    strategy=st.sampled_from(STRATEGIES),
    threshold=st.floats(0, 1),
    forced=st.booleans(),
)
def test_equals_the_oracle(data, tiles, sizes, experts, hidden, strategy, threshold, forced):
    image_of_tile = [i for i, count in enumerate(tiles) for _ in range(count)]
    starts = np.cumsum([0, *tiles[:-1]])
    base = [int(s) + data.draw(st.integers(0, n - 1)) for s, n in zip(starts, tiles, strict=True)]
    x, weights = features(len(image_of_tile), *sizes), router(sizes[1], experts, hidden)
    ids = st.lists(st.integers(0, experts - 1), min_size=len(tiles), max_size=len(tiles))
    expert = data.draw(ids) if forced else None
    name, against = strategy
    got = route(
        x,
        weights,
        Strategy(name, tau=threshold, delta=threshold, against=against),
        image_of_tile=torch.tensor(image_of_tile),
        base_tile=torch.tensor(base),
        expert=None if expert is None else torch.tensor(expert),
        eps=1e-6,
    )
    wanted = oracle_scores(
        x.numpy(), [None if w is None else w.numpy() for w in weights], base, 1e-6
    )
    np.testing.assert_allclose(got.scores.numpy(), wanted, rtol=1e-9, atol=1e-12)
    chosen = expert or [
        oracle_decision(row, name, threshold, against) for row in got.scores.tolist()
    ]
    assert got.expert.tolist() == [chosen[i] for i in image_of_tile]
    assert got.order.tolist() == sorted(range(len(x)), key=lambda b: chosen[image_of_tile[b]])
    assert got.offsets.tolist() == [sum(e < k for e in got.expert) for k in range(experts + 1)]


def test_each_strategy_uses_its_own_threshold():
    x, weights = features(8, 2, 6), router(6, 3)
    direct = route(x, weights, Strategy("direct", tau=1.0, delta=1.0)).expert
    assert direct.any()
    for name, threshold in (("score_threshold", "tau"), ("score_difference", "delta")):
        other = "delta" if threshold == "tau" else "tau"
        loose = Strategy(name, **{threshold: 0.0, other: 1.0})
        strict = Strategy(name, **{threshold: 1.0, other: 0.0})
        assert torch.equal(route(x, weights, loose).expert, direct)
        assert not route(x, weights, strict).expert.any()


@pytest.mark.parametrize("last", [False, True])
def test_only_the_base_tile_of_an_image_is_scored(last):
    """LLaVA's families put the view of the whole image first, InternVL last."""
    image_of_tile, base = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 3, 4])
    if last:
        base = torch.tensor([2, 3, 5])
    x, weights = features(6, 4, 8), router(8, 4)
    got = route(x, weights, Strategy("direct"), image_of_tile=image_of_tile, base_tile=base)
    alone = route(x[base], weights, Strategy("direct"))
    assert torch.equal(got.scores, alone.scores)
    assert torch.equal(got.expert, alone.expert[image_of_tile])
    others = [b for b in range(6) if b not in base.tolist()]
    x[others] = NAN
    blind = route(x, weights, Strategy("direct"), image_of_tile=image_of_tile, base_tile=base)
    assert torch.equal(blind.scores, got.scores)


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_image_goes_to_expert_0_and_touches_no_other(bad, hidden):
    x, weights = features(6, 3, 8, dtype=torch.float32), router(8, 4, hidden, dtype=torch.float32)
    weights.bias[0] -= 10  # so that nobody goes to expert 0 of his own accord
    before = route(x, weights, Strategy("direct"))
    victim = 2
    assert before.expert.all()
    x[victim, 1, 2] = bad
    after = route(x, weights, Strategy("direct"))
    others = [b for b in range(6) if b != victim]
    assert after.expert[victim] == 0
    assert torch.equal(after.expert[others], before.expert[others])
    assert torch.equal(after.scores[others], before.scores[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, width, experts, hidden", [(3, 5, 3, 7), (1, 7, 8, None), (9, 17, 5, 3)]
)
def test_an_image_is_bitwise_the_same_in_any_batch_and_order(tokens, width, experts, hidden, dtype):
    x = features(7, tokens, width, dtype=dtype)
    weights = router(width, experts, hidden, dtype=dtype)
    whole = route(x, weights, Strategy("direct"))
    for b in range(7):
        one = route(x[b : b + 1], weights, Strategy("direct"))
        assert torch.equal(one.scores[0], whole.scores[b])
        assert one.expert[0] == whole.expert[b]
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    permuted = route(x[order], weights, Strategy("direct"))
    assert torch.equal(permuted.scores, whole.scores[order])
    assert torch.equal(permuted.expert, whole.expert[order])


@pytest.mark.parametrize("hidden", [None, 9])
@pytest.mark.parametrize("tokens, width, experts", [(3, 5, 3), (17, 72, 4)])
def test_the_gradient_of_an_image_is_bitwise_the_same_in_any_batch(tokens, width, experts, hidden):
    x = features(7, tokens, width, dtype=torch.float32)
    weights = router(width, experts, hidden, dtype=torch.float32)
    dscores = torch.randn(7, experts, generator=torch.Generator().manual_seed(3))

    def gradient(tiles):
        part = x[tiles].clone().requires_grad_()
        scores = route(part, weights, Strategy("direct"), backend="reference").scores
        return torch.autograd.grad(scores, part, dscores[tiles])[0]

    whole = gradient(list(range(7)))
    for tiles in ([4], [6, 2, 0, 5, 1, 3]):
        assert torch.equal(gradient(tiles), whole[tiles])


def plain_scores(x, weights, base_tile, eps=1e-5):
    gamma, beta, hidden, hidden_bias, weight, bias = weights
    z = F.layer_norm(x[base_tile].mean(1), gamma.shape, gamma, beta, eps)
    if hidden is not None:
        z = F.gelu(F.linear(z, hidden, hidden_bias))
    return F.linear(z, weight, bias).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [None, 24])
@pytest.mark.parametrize("backend", HERE)
def test_scores_and_gradients_are_as_accurate_as_plain_pytorch(backend, hidden, dtype):
    reason = why_not("route", backend, device="cpu", dtype=dtype)
    if reason is not None:
        pytest.skip(reason)
    start = features(40, 9, 40, dtype=dtype), *router(40, 4, hidden, dtype=dtype)
    image_of_tile, base = torch.arange(40) // 2, torch.arange(1, 40, 2)
    dy = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(function, wide):
        leaves = [None if t is None else t.to(wide).requires_grad_() for t in start]
        scores = function(leaves[0], RouterWeights(*leaves[1:]))
        given = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(scores, given, dy.to(scores.dtype))
        return scores.detach(), *(g.to(t.dtype) for g, t in zip(grads, start_given, strict=True))

    def ours(x, weights):
        given = {"image_of_tile": image_of_tile, "base_tile": base, "backend": backend}
        return route(x, weights, Strategy("direct"), **given).scores

    start_given = [t for t in start if t is not None]
    got = run(ours, dtype)
    # The router computes in float32 whatever the dtype of the features: float32 is what plain PyTorch is given.
    plain = run(lambda x, w: plain_scores(x, w, base), torch.float32)
    start_given = [t.double() for t in start_given]
    truth = run(lambda x, w: plain_scores(x, w, base), torch.float64)
    assert got[0].dtype == torch.float32
    for i, tensors in enumerate(zip(got, plain, truth, strict=True)):
        assert_as_accurate(f"output {i}", *tensors)


@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize("anyres", [False, True])
def test_gradcheck(anyres, hidden):
    x, weights = features(4, 2, 5).requires_grad_(), router(5, 3, hidden)
    given = [w.requires_grad_() for w in weights if w is not None]
    extra = {}
    if anyres:
        extra = {"image_of_tile": torch.tensor([0, 0, 1, 1]), "base_tile": torch.tensor([1, 2])}

    def function(x, *given):
        mlp = given[2:4] if hidden else (None, None)
        rebuilt = RouterWeights(*given[:2], *mlp, *given[-2:])
        return route(x, rebuilt, Strategy("direct"), **extra).scores

    assert torch.autograd.gradcheck(function, (x, *given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("forced", [False, True])
def test_opcheck(forced, hidden, dtype):
    x = features(4, 3, 8, dtype=dtype)
    weights = [None if w is None else w.requires_grad_() for w in router(8, 3, hidden, dtype=dtype)]
    expert = torch.tensor([2, 1]) if forced else None
    tiles = None, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2]), expert
    args = (x, *tiles, *weights, 1e-5, "direct", 0.0, "runner_up", "auto")
    torch.library.opcheck(torch.ops.mixpert.route.default, args)


def test_double_backward_says_that_there_is_none():
    x, weights = features(4, 2, 5).requires_grad_(), router(5, 3)
    scores = route(x, weights, Strategy("direct")).scores
    (dx,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="route: double backward is not supported"):
        dx.sum().backward()


def test_scores_are_float32_under_autocast_too():
    x, weights = features(4, 2, 5, dtype=torch.float32), router(5, 3, 4, dtype=torch.float32)
    wanted = route(x, weights, Strategy("direct")).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route(x, weights, Strategy("direct")).scores, wanted)


def test_memory_layout_does_not_matter():
    x, weights = features(4, 3, 8), router(8, 3)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    got, wanted = (route(t, weights, Strategy("direct")) for t in (strided, x))
    torch.testing.assert_close(got, wanted)


def test_compiles_as_one_graph_for_every_route():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def function(x, weights):
        routing = route(x, weights, Strategy("score_difference", delta=0.2))
        return (x * routing.expert[:, None, None]).sum(), routing

    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    weights = router(8, 4)
    weights.weight.requires_grad_()
    for seed in range(10):
        x = features(4, 3, 8, seed=seed).requires_grad_()
        got, wanted = compiled(x, weights), function(x, weights)
        torch.testing.assert_close(got, wanted)
        grads = [
            torch.autograd.grad(routing.scores.square().sum(), (x, weights.weight))
            for _, routing in (got, wanted)
        ]
        torch.testing.assert_close(*grads)
    assert graphs.frame_count == 1
