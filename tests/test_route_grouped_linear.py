"""route_grouped_linear: every backend against plain PyTorch, and bit for bit against the three ops it replaces."""

from __future__ import annotations

import functools
import importlib
import math

import _served
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels.backends import BACKENDS, pick, why_not
from mixpert_kernels.ops import (
    RouterWeights,
    Strategy,
    grouped_layer_norm,
    grouped_linear,
    route,
    route_grouped_linear,
)
from mixpert_kernels.testing import assert_as_accurate

OP = "route_grouped_linear"
HERE = [name for name in BACKENDS if why_not(OP, name, device="cpu", dtype=torch.float32) is None]
NEEDS_TRITON = pytest.mark.skipif("triton" not in HERE, reason="triton does not run here")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIRECT = Strategy("direct")
# Images of 1, 3 and 2 tiles; the view of the whole image comes first or last.
IMAGE_OF_TILE = torch.tensor([0, 1, 1, 1, 2, 2])
TILES = {
    "a tile an image": {},
    "base tile first": {"image_of_tile": IMAGE_OF_TILE, "base_tile": torch.tensor([0, 1, 4])},
    "base tile last": {"image_of_tile": IMAGE_OF_TILE, "base_tile": torch.tensor([0, 3, 5])},
}


def problem(
    dtype=torch.float64,
    *,
    experts=4,
    hidden=None,
    widths=(40,),
    sizes=(6, 17, 72),
    biased=True,
    seed=7,
):
    """The positional arguments; images differ, and no parameter is idle."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, std=None):
        std = std or (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    depth = sizes[-1]
    x = rand(*sizes, std=1.0)
    x = (x + 2 * x.mean(1, keepdim=True)).to(dtype)
    mlp = (None, None) if hidden is None else (rand(hidden, depth), rand(hidden))
    last = 4 * rand(experts, hidden or depth)  # so that scores are far apart
    router = [rand(depth) + 1, rand(depth, std=0.1), *mlp, last, rand(experts, std=0.1)]
    router = RouterWeights(*(None if t is None else t.to(dtype) for t in router))
    gain, offset = rand(2, experts, depth, std=0.5).to(dtype)
    weights = [rand(experts, n, depth).to(dtype) for n in widths]
    biases = [rand(experts, n, std=1.0).to(dtype) for n in widths]
    return x, router, DIRECT, gain + 1, offset if biased else None, weights, biases


def three_ops(p, *, activation="none", backend="auto", norm_eps=1e-6, **images):
    x, router, strategy, gain, offset, weights, biases = p
    routing = route(x, router, strategy, backend=route_backend(backend), **images)
    h = grouped_layer_norm(x, gain, offset, routing, eps=norm_eps, backend=backend)
    return grouped_linear(
        h, weights, biases, routing, activation=activation, backend=backend
    ), routing


def route_backend(backend):
    """The CPU backend leaves routing to the reference."""
    return "reference" if backend == "cpu" else backend


def call(p, **options):
    return route_grouped_linear(*p, **{"norm_eps": 1e-6} | options)


skip_unless_served = functools.partial(_served.skip_unless_served, OP)


def assert_same_bits(got, wanted):
    y, routing = wanted
    assert torch.equal(got.y, y)
    for ours, theirs in zip(got.routing[:4], routing[:4], strict=True):
        assert torch.equal(ours, theirs)


def test_by_hand():
    x = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 8.0], [0.0, 2.0]]])
    router = RouterWeights(
        torch.ones(2), torch.zeros(2), None, None, torch.eye(2), torch.tensor([0.0, 1.0])
    )
    gain, offset = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    weight, bias = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[0.5], [-1.0]])
    y, routing = route_grouped_linear(x, router, DIRECT, gain, offset, weight, bias, norm_eps=0.0)
    # Both rows of a tile normalise to (1, -1) or (-1, 1); expert 1 maps the latter to (-2, 2 + 5), sum 5, minus 1.
    assert routing.expert.tolist() == [0, 1]
    torch.testing.assert_close(y.flatten(), torch.tensor([1.5, 1.5, 4.0, 4.0]))
    logits = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    torch.testing.assert_close(routing.scores, logits.softmax(-1), rtol=1e-4, atol=1e-4)


def plain(p, expert, activation):
    """Of given routes, a tile at a time."""
    x, _, _, gain, offset, weights, biases = p
    rows = []
    for b, e in enumerate(expert.tolist()):
        h = F.layer_norm(x[b], x.shape[-1:], gain[e], None if offset is None else offset[e], 1e-6)
        z = F.linear(h, torch.cat([w[e] for w in weights]), torch.cat([v[e] for v in biases]))
        rows.append(F.gelu(z) if activation == "gelu" else z)
    return torch.stack(rows)


def to(p, dtype):
    def cast(value):
        if isinstance(value, RouterWeights):
            return RouterWeights(*map(cast, value))
        if isinstance(value, list):
            return [cast(t) for t in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return tuple(cast(value) for value in p)


@pytest.mark.parametrize("biased, activation", [(True, "none"), (False, "gelu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, biased, activation):
    skip_unless_served(backend, dtype)
    p = problem(dtype, biased=biased)
    exact = to(p, torch.float64)
    got = call(p, activation=activation, backend=backend)
    expert = got.routing.expert
    assert len(expert.unique()) > 1
    assert got.y.dtype == dtype and got.routing.scores.dtype == torch.float32
    truth = plain(exact, expert, activation)
    assert_as_accurate("y", got.y, plain(p, expert, activation), truth)
    scores = [
        call(to(p, d), backend="reference").routing.scores for d in (torch.float32, exact[0].dtype)
    ]
    assert_as_accurate("scores", got.routing.scores, *scores)


@pytest.mark.parametrize(
    "strategy, hidden",
    [("direct", None), ("direct", 24), ("score_threshold", None), ("score_difference", 24)],
)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("backend", HERE)
def test_is_bit_for_bit_the_three_ops(backend, tiles, hidden, strategy):
    p = list(problem(torch.float32, hidden=hidden))
    p[2] = Strategy(strategy, tau=0.6, delta=0.3)
    options = TILES[tiles] | {"backend": backend}
    got = call(p, **options)
    assert_same_bits(got, three_ops(p, **options))
    assert len(got.routing.expert.unique()) > 1


# T, D, N: odd ones, a block of rows and a few, columns that fill a block and more, one row, one column
SHAPES = [(17, 72, 136), (130, 40, 24), (1, 33, 7), (33, 128, 129), (5, 4, 1), (3, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, depth, width", SHAPES)
@pytest.mark.parametrize("backend", HERE)
def test_any_shape_is_bit_for_bit_the_three_ops(backend, tokens, depth, width, dtype):
    skip_unless_served(backend, dtype)
    p = problem(dtype, sizes=(3, tokens, depth), widths=(width,), seed=tokens)
    options = {"activation": "gelu", "backend": backend}
    assert_same_bits(call(p, **options), three_ops(p, **options))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("backend", HERE)
def test_forced_routes(backend, tiles):
    p = problem(torch.float32, experts=8)
    images = 6 if not TILES[tiles] else 3
    for dtype, first in ((torch.int64, 7), (torch.int32, 0)):  # experts without tiles in between
        expert = torch.tensor([first, 3, first, 3, 3, first][:images], dtype=dtype)
        options = TILES[tiles] | {"expert": expert, "backend": backend}
        got = call(p, **options)
        of_tile = expert[IMAGE_OF_TILE] if TILES[tiles] else expert
        assert torch.equal(got.routing.expert, of_tile.int())
        assert_same_bits(got, three_ops(p, **options))
        free = call(p, **TILES[tiles], backend=backend)
        assert torch.equal(got.routing.scores, free.routing.scores)


@pytest.mark.parametrize("backend", HERE)
def test_one_expert(backend):
    p = problem(torch.float32, experts=1)
    got = call(p, backend=backend)
    assert got.routing.expert.eq(0).all() and got.routing.offsets.tolist() == [0, 6]
    assert_same_bits(got, three_ops(p, backend=backend))


# One launch takes up to three weights of one shape; the others are for the ops one after the other.
@pytest.mark.parametrize("widths", [(24,), (8, 8), (8, 8, 8), (8, 16), (8, 8, 8, 8)])
@pytest.mark.parametrize("backend", HERE)
def test_weights_lie_side_by_side(backend, widths):
    p = problem(torch.float32, widths=widths)
    joined = [*p[:5], torch.cat(p[5], 1), torch.cat(p[6], 1)]
    got, wanted = (call(q, backend=backend) for q in (p, joined))
    torch.testing.assert_close(got.y, wanted.y)
    bare = call([*p[:6], None], backend=backend)
    torch.testing.assert_close(
        bare.y + torch.cat(p[6], 1)[got.routing.expert.long()][:, None], got.y
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_image_is_bitwise_the_same_in_any_batch_and_order(backend, dtype):
    skip_unless_served(backend, dtype)
    p = problem(dtype)
    whole = call(p, backend=backend)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    permuted = call((p[0][order], *p[1:]), backend=backend)
    assert torch.equal(permuted.y, whole.y[order])
    assert torch.equal(permuted.routing.scores, whole.routing.scores[order])
    for b in (0, 3):
        alone = call((p[0][b : b + 1], *p[1:]), backend=backend)
        assert torch.equal(alone.y[0], whole.y[b])


@pytest.mark.parametrize("backend", HERE)
def test_a_non_finite_image_goes_to_expert_0_and_touches_no_other(backend):
    p = problem(torch.float32)
    before = call(p, backend=backend)
    others = [b for b in range(6) if b != 2]
    p[0][2, 1, 3] = math.nan
    after = call(p, backend=backend)
    assert after.routing.expert[2] == 0
    assert after.y[2, 1].isnan().all() and after.y[2, [0, *range(2, 17)]].isfinite().all()
    assert torch.equal(after.y[others], before.y[others])


def test_a_gradient_is_that_of_the_three_ops():
    p = problem(torch.float64)
    leaves = [p[0], p[1].weight, p[3], *p[5], *p[6]]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = []
    for function in (call, three_ops):
        y, routing = function(p)
        loss = y.square().sum() + routing.scores.square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *grads))
    with torch.no_grad():
        assert not call(p).y.requires_grad


def test_autocast_is_that_of_the_three_ops():
    p = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(p)
        assert got.y.dtype == torch.bfloat16
        assert_same_bits(got, three_ops(p))
        assert call(problem()).y.dtype == torch.float64


@pytest.mark.parametrize("backend", HERE)
def test_half_precision_parameters_beside_float32_features(backend):
    p = problem(torch.float32)
    half = to(p[1:], torch.bfloat16)
    if backend == "triton":  # the interpreter's bfloat16 products are wrong
        half = to(p[1:], torch.float16)
    got = call((p[0], *half), backend=backend)
    assert_same_bits(got, three_ops((p[0], *half), backend=backend))
    wide = call((p[0], *to(half, torch.float32)), backend=backend)
    torch.testing.assert_close(got.y, wide.y)


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    p = problem(torch.float32)
    wanted = call(p, backend=backend)

    def strided(t):
        if isinstance(t, list):
            return [strided(s) for s in t]
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    other = [
        strided(p[0]),
        p[1]._replace(weight=strided(p[1].weight)),
        DIRECT,
        *map(strided, p[3:]),
    ]
    got = call(other, backend=backend)
    torch.testing.assert_close(tuple(got), tuple(wanted))
    within = torch.full((6, 20, 80), math.nan)
    within[:, 3:, 8:] = p[0]  # strides larger than the sizes
    got = call((within[:, 3:, 8:], *p[1:]), backend=backend)
    torch.testing.assert_close(tuple(got), tuple(wanted))


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend, dtype, forced):
    skip_unless_served(backend, dtype)
    x, router, strategy, gain, offset, weights, biases = problem(dtype, sizes=(6, 3, 16))
    expert = torch.tensor([2, 1, 0]) if forced else None
    images = (*TILES["base tile last"].values(), expert) if forced else (None, None, None)
    rule = (1e-5, strategy.name, strategy.threshold, strategy.against)
    layer = (gain, offset, 1e-6, weights, biases, "gelu", backend)
    args = (x, None, *images, *router, *rule, *layer)
    torch.library.opcheck(torch.ops.mixpert.route_grouped_linear.default, args)


def test_compiles_as_one_graph_for_every_route():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda p: call(p), backend=graphs, fullgraph=True)
    p = problem(torch.float32)
    for seed in range(5):
        q = (problem(torch.float32, seed=seed)[0], *p[1:])
        torch.testing.assert_close(tuple(compiled(q)), tuple(call(q)))
    assert graphs.frame_count == 1


@NEEDS_TRITON
@pytest.mark.parametrize(
    "options, launches",
    [
        ({}, 1),
        ({"experts": 8, "widths": (24,)}, 1),
        ({"widths": (8, 16)}, 4),  # route, the norm, and a product for each shape of weight
        ({"sizes": (2, 3, 4)}, 3),  # features too narrow for blocks of rows
    ],
)
def test_launches(options, launches, monkeypatch):
    launcher = importlib.import_module("mixpert_kernels.backends.triton._launch")
    launch, seen = launcher.launch, []
    monkeypatch.setattr(launcher, "launch", lambda *args: seen.append(args[0]) or launch(*args))
    call(problem(torch.float32, **options), backend="triton")
    assert len(seen) == launches


@NEEDS_TRITON
def test_a_program_that_waits_in_vain_traps(monkeypatch):
    """Without the tickets that pool no image has an expert; on a GPU this ends after about a minute."""
    module = pick(OP, "triton", device="cpu", dtype=torch.float32)
    launch = module._launch.launch

    def all_but_the_first(kernel, grid, args, config):
        args["counters_ptr"][0] = 6  # of 6 images, a block of rows each
        launch(kernel, grid, args, config)

    monkeypatch.setattr(module._launch, "launch", all_but_the_first)
    with pytest.raises(Exception, match="inline_asm"):
        call(problem(torch.float32), backend="triton")


def test_what_concerns_the_router_is_said_in_the_words_of_route():
    with pytest.raises(ValueError, match="route: expert must lie in 0"):
        call(problem(), expert=torch.tensor([0, 1, 2, 3, 4, 0]))
