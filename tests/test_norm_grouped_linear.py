"""norm_grouped_linear: every backend against plain PyTorch, and bit for bit against the two ops it replaces."""

from __future__ import annotations

import functools
import importlib
import math

import _served
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.ops import grouped_layer_norm, grouped_linear, norm_grouped_linear
from mixpert_kernels.testing import assert_as_accurate

OP = "norm_grouped_linear"
HERE = [name for name in BACKENDS if why_not(OP, name, device="cpu", dtype=torch.float32) is None]
NEEDS_TRITON = pytest.mark.skipif("triton" not in HERE, reason="triton does not run here")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERT = (3, 0, 3, 1, 0, 3)  # expert 2 has nothing to do


def problem(
    dtype=torch.float64, *, experts=4, widths=(40,), sizes=(6, 17, 72), biased=True, seed=7
):
    """The positional arguments; no parameter is idle."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, std=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    depth = sizes[-1]
    x = 2 * rand(*sizes) + 1
    gain, offset = rand(2, experts, depth, std=0.5)
    weights = [rand(experts, n, depth, std=depth**-0.5) for n in widths]
    biases = [rand(experts, n) for n in widths]
    expert = torch.tensor((EXPERT * len(x))[: len(x)]) % experts
    given = (gain + 1, offset if biased else None, weights, biases if biased else None)
    return x, *given, Routing.forced(expert, experts)


def call(p, **options):
    return norm_grouped_linear(*p, **{"norm_eps": 1e-6} | options)


def two_ops(p, *, activation="none", backend="auto", norm_eps=1e-6):
    x, gain, offset, weights, biases, routing = p
    h = grouped_layer_norm(x, gain, offset, routing, eps=norm_eps, backend=backend)
    return grouped_linear(h, weights, biases, routing, activation=activation, backend=backend)


def plain(p, activation="none"):
    """A tile at a time."""
    x, gain, offset, weights, biases, routing = p
    rows = []
    for b, e in enumerate(routing.expert.tolist()):
        h = F.layer_norm(x[b], x.shape[-1:], gain[e], None if offset is None else offset[e], 1e-6)
        bias = None if biases is None else torch.cat([v[e] for v in biases])
        z = F.linear(h, torch.cat([w[e] for w in weights]), bias)
        rows.append(F.gelu(z) if activation == "gelu" else z)
    return torch.stack(rows)


def to(p, dtype):
    def cast(value):
        if isinstance(value, list):
            return [cast(t) for t in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return tuple(cast(value) for value in p)


skip_unless_served = functools.partial(_served.skip_unless_served, OP)


def test_by_hand():
    x = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 8.0], [0.0, 2.0]]])
    gain, offset = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    weight, bias = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[0.5], [-1.0]])
    routing = Routing.forced(torch.tensor([0, 1]), 2)
    y = norm_grouped_linear(x, gain, offset, weight, bias, routing, norm_eps=0.0)
    # Both rows of a tile normalise to (1, -1) or (-1, 1); expert 1 maps the latter to (-2, 2 + 5), sum 5, minus 1.
    torch.testing.assert_close(y.flatten(), torch.tensor([1.5, 1.5, 4.0, 4.0]))


@pytest.mark.parametrize("biased, activation", [(True, "none"), (False, "gelu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, biased, activation):
    skip_unless_served(backend, dtype)
    p = problem(dtype, biased=biased)
    got = call(p, activation=activation, backend=backend)
    assert got.dtype == dtype
    truth = plain(to(p, torch.float64), activation)
    assert_as_accurate("y", got, plain(p, activation), truth)


def test_float64_is_exact():
    p = problem()
    torch.testing.assert_close(call(p, activation="gelu"), plain(p, "gelu"), rtol=1e-12, atol=1e-12)


# T, D, N: odd ones, a block of rows and a few, columns that fill a block and more, one row, one column
SHAPES = [(17, 72, 136), (130, 40, 24), (1, 33, 7), (33, 128, 129), (5, 4, 1), (3, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, depth, width", SHAPES)
@pytest.mark.parametrize("backend", HERE)
def test_any_shape_is_bit_for_bit_the_two_ops(backend, tokens, depth, width, dtype):
    skip_unless_served(backend, dtype)
    p = problem(dtype, sizes=(3, tokens, depth), widths=(width,), seed=tokens)
    options = {"activation": "gelu", "backend": backend}
    assert torch.equal(call(p, **options), two_ops(p, **options))


@pytest.mark.parametrize("experts", [1, 2, 7])
@pytest.mark.parametrize("backend", HERE)
def test_any_number_of_experts(backend, experts):
    p = problem(torch.float32, experts=experts)
    got = call(p, backend=backend)
    assert torch.equal(got, two_ops(p, backend=backend))
    torch.testing.assert_close(got, plain(p))


@pytest.mark.parametrize("widths", [(24,), (8, 8), (8, 8, 8), (8, 16), (8, 8, 8, 8)])
@pytest.mark.parametrize("backend", HERE)
def test_weights_lie_side_by_side(backend, widths):
    x, gain, offset, weights, biases, routing = problem(torch.float32, widths=widths)
    got = call((x, gain, offset, weights, biases, routing), backend=backend)
    joined = (torch.cat(weights, 1), torch.cat(biases, 1))
    torch.testing.assert_close(got, call((x, gain, offset, *joined, routing), backend=backend))
    bare = call((x, gain, offset, weights, None, routing), backend=backend)
    torch.testing.assert_close(bare + joined[1][routing.expert.long()][:, None], got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(backend, dtype):
    skip_unless_served(backend, dtype)
    x, *given, routing = problem(dtype)
    whole = call((x, *given, routing), backend=backend)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    for tiles in (order, order[:1], order[3:4]):
        some = Routing.forced(routing.expert[tiles].long(), 4)
        assert torch.equal(call((x[tiles], *given, some), backend=backend), whole[tiles])


@pytest.mark.parametrize("backend", HERE)
def test_a_tile_that_is_not_finite_touches_no_other(backend):
    p = problem(torch.float32)
    before = call(p, backend=backend)
    p[0][2, 1, 3] = math.nan
    after = call(p, backend=backend)
    others = [b for b in range(6) if b != 2]
    assert after[2, 1].isnan().all() and after[2, [0, *range(2, 17)]].isfinite().all()
    assert torch.equal(after[others], before[others])


def test_a_gradient_is_that_of_the_two_ops():
    p = problem()
    leaves = [p[0], p[1], p[2], *p[3], *p[4]]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = [
        torch.autograd.grad(function(p).square().sum(), leaves) for function in (call, two_ops)
    ]
    assert all(map(torch.equal, *grads))
    with torch.no_grad():
        assert not call(p).requires_grad


def test_autocast_is_that_of_the_two_ops():
    p = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(p)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, two_ops(p))
        assert call(problem()).dtype == torch.float64


@pytest.mark.parametrize("backend", HERE)
def test_half_precision_parameters_beside_float32_features(backend):
    # the interpreter's bfloat16 products are wrong
    half = torch.float16 if backend == "triton" else torch.bfloat16
    x, *given, routing = problem(torch.float32)
    given = to(given, half)
    got = call((x, *given, routing), backend=backend)
    assert torch.equal(got, two_ops((x, *given, routing), backend=backend))
    wide = call((x, *to(given, torch.float32), routing), backend=backend)
    torch.testing.assert_close(got, wide)


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    p = problem(torch.float32)
    wanted = call(p, backend=backend)

    def strided(t):
        if isinstance(t, list):
            return [strided(s) for s in t]
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    got = call((*map(strided, p[:5]), p[5]), backend=backend)
    torch.testing.assert_close(got, wanted)
    within = torch.full((6, 20, 80), math.nan)
    within[:, 3:, 8:] = p[0]  # strides larger than the sizes
    torch.testing.assert_close(call((within[:, 3:, 8:], *p[1:]), backend=backend), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend, dtype):
    skip_unless_served(backend, dtype)
    x, gain, offset, weights, biases, routing = problem(dtype, sizes=(6, 3, 16), widths=(8, 8))
    args = (x, gain, offset, 1e-6, weights, biases, *routing.ids, "gelu", backend)
    torch.library.opcheck(torch.ops.mixpert.norm_grouped_linear.default, args)


def test_compiles_as_one_graph_for_every_route():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda p: call(p), backend=graphs, fullgraph=True)
    x, *given, _ = problem(torch.float32)
    for expert in ([3, 0, 3, 1, 0, 3], [0] * 6, [1, 2, 3, 0, 1, 2]):
        p = (x, *given, Routing.forced(torch.tensor(expert), 4))
        torch.testing.assert_close(compiled(p), call(p))
    assert graphs.frame_count == 1


@NEEDS_TRITON
def test_triton_launches_twice(monkeypatch):
    launcher = importlib.import_module("mixpert_kernels.backends.triton._launch")
    launch, seen = launcher.launch, []
    monkeypatch.setattr(launcher, "launch", lambda *args: seen.append(args[0]) or launch(*args))
    call(problem(torch.float32, widths=(8, 8, 8)), backend="triton")
    assert len(seen) == 2
