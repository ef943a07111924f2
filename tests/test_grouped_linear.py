"""grouped_linear: every backend, forward and all gradients, against a few lines of plain PyTorch or NumPy."""

from __future__ import annotations

import functools
import math

import _served
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.ops import grouped_linear
from mixpert_kernels.testing import assert_as_accurate

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUNNING = [b for b in BACKENDS if not why_not("grouped_linear", b, device="cpu", dtype=DTYPES[0])]
ODD = ((3, 5, 7), (1, 5, 3), (2, 3, 1), (1, 1, 1), (7, 9, 11), (17, 13, 19))  # T, K, N


def oracle(x, weight, bias, expert, activation, residual, scale):
    """In NumPy, one tile at a time."""
    act = {
        "none": lambda z: z,
        "gelu": np.vectorize(lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2)))),
        "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
        "relu": lambda z: np.maximum(z, 0),
    }[activation]
    y = []
    for b, e in enumerate(expert):
        z = act(np.einsum("tk,nk->tn", x[b], weight[e]) + (0 if bias is None else bias[e]))
        y.append(z * (1 if scale is None else scale[e]) + (0 if residual is None else residual[b]))
    return np.stack(y)


def plain(x, weight, bias, expert, activation, residual, scale):
    """In plain PyTorch, one tile at a time; autograd gives its gradients."""
    act = {
        "none": lambda z: z,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
        "relu": F.relu,
    }[activation]
    y = []
    for b, e in enumerate(expert.tolist()):
        z = act(F.linear(x[b], weight[e], None if bias is None else bias[e]))
        z = z if scale is None else z * scale[e]
        y.append(z if residual is None else z + residual[b])
    return torch.stack(y)


def problem(tokens, depth, width, expert, experts, *, dtype=torch.float64, seed=0, without=()):
    """Random tensors by name; None for the names in ``without``."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(expert)
    shapes = {
        "x": (batch, tokens, depth),
        "weight": (experts, width, depth),
        "bias": (experts, width),
        "residual": (batch, tokens, width),
        "scale": (experts, width),
    }
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return {n: None if n in without else draw(s).to(dtype) for n, s in shapes.items()}


def call(p, expert, activation="none", backend="auto"):
    routing = Routing.forced(torch.as_tensor(expert), p["weight"].shape[0])
    last = {name: p[name] for name in ("residual", "scale")} | {"backend": backend}
    return grouped_linear(p["x"], p["weight"], p["bias"], routing, activation=activation, **last)


skip_unless_served = functools.partial(_served.skip_unless_served, "grouped_linear")


@pytest.fixture(autouse=True)
def runs_here(request):
    if (case := getattr(request.node, "callspec", None)) and "backend" in case.params:
        skip_unless_served(case.params["backend"], case.params.get("dtype", torch.float32))


def leaves(p, dtype=None):
    return {n: None if t is None else t.to(dtype).clone().requires_grad_() for n, t in p.items()}


def gradients(p, y, dy):
    names = [n for n, t in p.items() if t is not None]
    return dict(zip(names, torch.autograd.grad(y, [p[n] for n in names], dy), strict=True))


def alone(p, b):
    """The problem of tile ``b`` (an index or a mask) alone."""
    pick = slice(b, b + 1) if isinstance(b, int) else b
    per_tile = ("x", "residual")
    return {n: t[pick] if n in per_tile and t is not None else t for n, t in p.items()}


def test_by_hand():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]], [[0.5, 0.0]]])
    weight = torch.tensor([[[1.0, 1.0]], [[1.0, 10.0]]])
    bias, scale = torch.tensor([[0.5], [-1.0]]), torch.tensor([[2.0], [3.0]])
    residual = torch.tensor([[[100.0]], [[200.0]], [[300.0]]])
    routing = Routing.forced(torch.tensor([1, 0, 1]), 2)
    y = grouped_linear(x, weight, bias, routing, activation="relu", residual=residual, scale=scale)
    # 3 relu(1 + 20 - 1) + 100 ; 2 relu(3 - 4 + 0.5) + 200 ; 3 relu(0.5 - 1) + 300
    assert y.flatten().tolist() == [160.0, 200.0, 300.0]


@given(
    data=st.data(),
    experts=st.integers(1, 8),
    batch=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    activation=st.sampled_from(ACTIVATIONS),
    without=st.sets(st.sampled_from(("bias", "residual", "scale"))),
    backend=st.sampled_from(RUNNING),
)
def test_equals_the_oracle(data, experts, batch, sizes, activation, without, backend):
    expert = data.draw(st.lists(st.integers(0, experts - 1), min_size=batch, max_size=batch))
    dtype, tolerance = {"reference": (torch.float64, 1e-12)}.get(backend, (torch.float32, 1e-4))
    p = problem(*sizes, expert, experts, dtype=dtype, without=without, seed=batch)
    wanted = {n: None if t is None else t.double().numpy() for n, t in p.items()}
    wanted = oracle(expert=expert, activation=activation, **wanted)
    for needs_gradient in (False, True):
        p["x"].requires_grad_(needs_gradient)
        y = call(p, expert, activation, backend).detach()
        assert y.dtype == dtype
        np.testing.assert_allclose(y.double().numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("without", [(), ("scale",), ("bias", "residual"), ("residual", "scale")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, activation, without):
    expert = torch.tensor([2, 0, 2, 2, 1, 0])
    start = problem(17, 72, 40, expert, 4, dtype=dtype, without=without)
    dy = torch.randn(6, 17, 40, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(function, dtype):
        p = leaves(start, dtype)
        y = function(p)
        with torch.no_grad():
            inference = function(p)
        return {"y": y.detach(), "y without gradient": inference} | gradients(p, y, dy.to(dtype))

    def by_plain(p):
        return plain(expert=expert, activation=activation, **p)

    got = run(lambda p: call(p, expert, activation, backend), dtype)
    ours, truth = run(by_plain, dtype), run(by_plain, torch.float64)
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, ours[name], truth[name])


@pytest.mark.parametrize("without", [(), ("bias", "scale", "residual"), ("scale",)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, without):
    expert = torch.tensor([1, 0, 1])
    p = leaves(problem(2, 3, 4, expert, 3, without=without), torch.float64)
    names = [n for n, t in p.items() if t is not None]

    def function(*tensors):
        return call(p | dict(zip(names, tensors, strict=True)), expert, activation)

    assert torch.autograd.gradcheck(function, tuple(p[n] for n in names))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual", "scale"])
def test_a_frozen_argument_gets_no_gradient_and_changes_no_other(frozen):
    expert = torch.tensor([1, 0])
    p = leaves(problem(2, 3, 4, expert, 2), torch.float64)
    dy = torch.ones(2, 2, 4, dtype=torch.float64)
    wanted = gradients(p, call(p, expert, "gelu"), dy)
    p[frozen].requires_grad_(False)
    call(p, expert, "gelu").backward(dy)
    assert p.pop(frozen).grad is None
    for name, tensor in p.items():
        assert torch.equal(tensor.grad, wanted[name]), name


@pytest.mark.parametrize("for_backward", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_opcheck(activation, backend, for_backward):
    p = problem(3, 5, 6, [1, 0, 1], 2, dtype=torch.float32)
    routing = Routing.forced(torch.tensor([1, 0, 1]), 2)
    if for_backward:
        p = leaves(p, torch.float32)
    weights, biases = ([t, t.detach().clone()] for t in (p["weight"], p["bias"]))
    scale = torch.cat([p["scale"]] * 2, 1)
    args = (p["x"], weights, biases, *routing.ids, activation, None, scale, for_backward, backend)
    torch.library.opcheck(torch.ops.mixpert.grouped_linear.default, args)


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True], [True] + [False] * 3])
def test_opcheck_of_the_backward(needs):
    p = problem(3, 5, 6, [1, 0, 1], 2, dtype=torch.float32)
    routing = Routing.forced(torch.tensor([1, 0, 1]), 2)
    dy, pre = torch.randn(2, 3, 3, 6).unbind()
    head = (dy, p["x"], [p["weight"]], [p["bias"]], pre, *routing.ids)
    torch.library.opcheck(
        torch.ops.mixpert.grouped_linear_backward.default,
        (*head, "gelu", p["scale"], needs, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_double_backward_says_that_there_is_none():
    p = leaves(problem(2, 3, 4, [0, 1], 2), torch.float64)
    y = call(p, [0, 1], "gelu")
    (dx,) = torch.autograd.grad(y.square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear: double backward is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", ODD)
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(sizes, activation, dtype):
    """Forward and gradients; odd sizes, so that rows are misaligned and vectors have a remainder."""
    expert = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    start = problem(*sizes, expert, 4, dtype=dtype)
    dy = torch.randn(7, sizes[0], sizes[2], generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(p, expert, dy):
        p = leaves(p, dtype)
        y = call(p, expert, activation, "reference")
        return y.detach(), gradients(p, y, dy)

    y, grads = run(start, expert, dy)
    for b in range(7):
        y_b, grads_b = run(alone(start, b), expert[b : b + 1], dy[b : b + 1])
        assert torch.equal(y[b], y_b[0])
        assert torch.equal(grads["x"][b], grads_b["x"][0])
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    y_permuted, _ = run(alone(start, order), expert[order], dy[order])
    assert torch.equal(y_permuted, y[order])
    for e in range(4):
        mask = expert == e
        if not mask.any():
            continue
        _, grads_e = run(alone(start, mask), expert[mask], dy[mask])
        for name in ("weight", "bias", "scale"):
            assert torch.equal(grads_e[name][e], grads[name][e]), (name, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", range(1, 9))
def test_one_expert_takes_all_and_the_others_get_exact_zeros(experts, backend):
    last = experts - 1
    p = leaves(problem(3, 5, 7, [last] * 3, experts, dtype=torch.float32), torch.float32)
    y = call(p, [last] * 3, "gelu", backend)
    assert y.isfinite().all()
    grads = gradients(p, y, torch.ones_like(y))
    for name in ("weight", "bias", "scale"):
        assert grads[name][last].ne(0).any()
        assert grads[name][:last].eq(0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_perturbing_one_tile_or_one_expert_touches_no_other_tile(activation, backend):
    """The inference path."""
    expert = torch.tensor([1, 0, 1, 2])
    p = problem(3, 8, 8, expert, 3, dtype=torch.float32)
    before = call(p, expert, activation, backend)
    p["x"][1] = float("nan")
    after = call(p, expert, activation, backend)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    p["weight"][1] += 1
    moved = call(p, expert, activation, backend)
    assert ((moved - after)[[0, 2]].abs() > 1e-3).any(-1).all()
    assert torch.equal(moved[3], after[3])


@pytest.mark.parametrize("widths", [(4, 3, 6), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_weights_equals_as_many_calls(backend, biased, widths):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 8, generator=generator).requires_grad_()
    weights = [torch.randn(2, n, 8, generator=generator).requires_grad_() for n in widths]
    biases = [torch.randn(2, n, generator=generator) for n in widths] if biased else None
    routing = Routing.forced(torch.tensor([1, 0, 1]), 2)
    y = grouped_linear(x, weights, biases, routing, backend=backend)
    one_by_one = [
        grouped_linear(x, w, biases and biases[i], routing, backend=backend)
        for i, w in enumerate(weights)
    ]
    torch.testing.assert_close(y, torch.cat(one_by_one, -1), rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        inference = grouped_linear(x, weights, biases, routing, backend=backend)
    torch.testing.assert_close(y, inference, rtol=1e-6, atol=1e-5)
    dy = torch.randn(y.shape, generator=generator)
    together = torch.autograd.grad(y, [x, *weights], dy)
    apart = torch.autograd.grad(one_by_one, [x, *weights], dy.split(widths, -1))
    for got, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_as_if_everything_were_cast(backend):
    skip_unless_served(backend, torch.bfloat16)
    expert = [1, 0, 1]
    p = leaves(problem(5, 8, 6, expert, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p, expert, "gelu", backend)
        exact = {n: t.double() for n, t in p.items()}
        assert call(exact, expert).dtype == torch.float64  # as PyTorch's own autocast does
    narrow = {n: t.bfloat16() for n, t in p.items()}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(narrow, expert, "gelu", backend))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in p.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_parameters_beside_float32_features_are_widened(backend):
    expert = [1, 0, 1]
    p = problem(5, 8, 6, expert, 2, dtype=torch.bfloat16)
    p |= {name: p[name].float() for name in ("x", "residual")}
    wide = {n: t.float() for n, t in p.items()}
    for activation in ("none", "gelu"):
        y = call(p, expert, activation, backend)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, call(wide, expert, activation, backend))
    p, wide = leaves(p), leaves(wide)
    dy = torch.ones(3, 5, 6)
    got = gradients(p, call(p, expert, "gelu", backend), dy)
    for name, wanted in gradients(wide, call(wide, expert, "gelu", backend), dy).items():
        assert torch.equal(got[name], wanted.to(p[name].dtype)), name


@pytest.mark.parametrize("every_second_row", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend, needs_gradient, every_second_row):
    expert = [1, 0, 0]  # the CPU backend takes neighbours of one expert at once
    p = problem(5, 8, 6, expert, 2, dtype=torch.float32)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in p.items()}
    if every_second_row:
        strided["x"] = torch.stack([p["x"], p["x"] + 1], 2)[:, :, 0]
    assert not any(t.is_contiguous() for t in strided.values())
    for t in (*p.values(), *strided.values()):
        t.requires_grad_(needs_gradient)
    y, got = call(p, expert, "gelu", backend), call(strided, expert, "gelu", backend)
    torch.testing.assert_close(got, y, rtol=1e-6, atol=1e-5)
    if needs_gradient:
        wanted = gradients(p, y, dy := torch.ones(()).expand_as(y))
        for name, gradient in gradients(strided, got, dy).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_the_pre_activation_only_when_backward_will_need_it(backend):
    p = problem(3, 5, 6, [1, 0], 2, dtype=torch.float32)
    routing = Routing.forced(torch.tensor([1, 0]), 2)

    def kept(activation, scale, for_backward):
        args = (p["x"], [p["weight"]], [p["bias"]], *routing.ids, activation, None, scale)
        return torch.ops.mixpert.grouped_linear(*args, for_backward, backend)[1].numel()

    assert kept("gelu", None, True) == kept("none", p["scale"], True) == 2 * 3 * 6
    assert kept("gelu", p["scale"], False) == kept("none", None, True) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_for_every_route(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True)
    def function(x, weight, bias, expert, order, offsets):
        routing = Routing(expert, order, offsets)
        y = grouped_linear(x, weight, bias, routing, activation="gelu", backend=backend)
        return grouped_linear(y.sin(), weight, bias, routing, residual=y, backend=backend)

    p = leaves(problem(3, 6, 6, [0] * 4, 3, dtype=torch.float32), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        expert = torch.randint(3, (4,), generator=generator)
        inputs = (p["x"], p["weight"], p["bias"], *Routing.forced(expert, 3)[:3])
        y, wanted = function(*inputs), function._torchdynamo_orig_callable(*inputs)
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
        got = torch.autograd.grad(y.sum(), inputs[:3])
        for g, w in zip(got, torch.autograd.grad(wanted.sum(), inputs[:3]), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1
