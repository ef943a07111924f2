"""grouped_layer_norm: every backend, forward and all gradients, against plain PyTorch or NumPy."""

from __future__ import annotations

import functools

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
from mixpert_kernels.ops import grouped_layer_norm
from mixpert_kernels.testing import assert_as_accurate

HERE = [
    name
    for name in BACKENDS
    if why_not("grouped_layer_norm", name, device="cpu", dtype=torch.float32) is None
]
NAMES = ("x", "weight", "bias")


skip_unless_served = functools.partial(_served.skip_unless_served, "grouped_layer_norm")


def oracle(x, weight, bias, expert, eps):
    y = np.empty_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        row = x[b, t] - x[b, t].mean()
        gain = weight[expert[b]] / np.sqrt((row**2).mean() + eps)
        y[b, t] = row * gain + (0 if bias is None else bias[expert[b]])
    return y


def problem(batch, tokens, width, experts, *, dtype=torch.float64, biased=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, width), (experts, width), (experts, width))
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes
    )
    return x, weight, bias if biased else None


def call(tensors, expert, eps=1e-6, backend="auto"):
    x, weight, bias = tensors
    routing = Routing.forced(torch.as_tensor(expert), weight.shape[0])
    return grouped_layer_norm(x, weight, bias, routing, eps=eps, backend=backend)


def run(function, tensors, dy):
    """The output and the gradients of all tensors that are not None, by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(leaves)
    given = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), dy)
    return {"y": y.detach()} | dict(zip(given, grads, strict=True))


def test_by_hand():
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]], [[-2.0, 2.0], [0.0, 8.0]]])
    weight, bias = torch.tensor([[1.0, 2.0], [10.0, 10.0]]), torch.tensor([[0.5, 0.0], [0.0, 7.0]])
    y = grouped_layer_norm(x, weight, bias, Routing.forced(torch.tensor([0, 1]), 2), eps=1e-12)
    wanted = [[[-0.5, 2.0], [0.5, 0.0]], [[-10.0, 17.0], [-10.0, 17.0]]]
    torch.testing.assert_close(y, torch.tensor(wanted))


@given(
    data=st.data(),
    experts=st.integers(1, 8),
    batch=st.integers(1, 6),
    tokens=st.integers(1, 5),
    width=st.integers(1, 9),
    biased=st.booleans(),
    eps=st.sampled_from((1e-6, 1e-5, 0.5)),
)
def test_equals_the_oracle(data, experts, batch, tokens, width, biased, eps):
    expert = data.draw(st.lists(st.integers(0, experts - 1), min_size=batch, max_size=batch))
    tensors = problem(batch, tokens, width, experts, biased=biased, seed=width)
    wanted = oracle(*(None if t is None else t.numpy() for t in tensors), expert, eps)
    np.testing.assert_allclose(call(tensors, expert, eps).numpy(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, biased):
    skip_unless_served(backend, dtype)
    expert = [2, 0, 2, 2, 1, 0]
    tensors = problem(6, 17, 72, 4, dtype=dtype, biased=biased)
    dy = torch.randn(6, 17, 72, generator=torch.Generator().manual_seed(1)).to(dtype)

    def plain(tensors):
        x, weight, bias = tensors
        rows = [
            F.layer_norm(x[b], (72,), weight[e], None if bias is None else bias[e], 1e-6)
            for b, e in enumerate(expert)
        ]
        return torch.stack(rows)

    got = run(lambda t: call(t, expert, backend=backend), tensors, dy)
    ours = run(plain, tensors, dy)
    exact = run(plain, [None if t is None else t.double() for t in tensors], dy.double())
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, ours[name], exact[name])


@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck(biased):
    tensors = [t.requires_grad_() for t in problem(3, 2, 4, 3, biased=biased) if t is not None]

    def function(x, weight, bias=None):
        return call((x, weight, bias), [1, 0, 1])

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(needs_gradient, biased, dtype, backend):
    skip_unless_served(backend, dtype)
    tensors = problem(2, 3, 8, 2, dtype=dtype, biased=biased)
    if needs_gradient:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    routing = Routing.forced(torch.tensor([1, 0]), 2).ids
    torch.library.opcheck(
        torch.ops.mixpert.grouped_layer_norm.default, (*tensors, *routing, 1e-6, backend)
    )


def test_opcheck_of_the_backward():
    x, weight, bias = problem(2, 3, 8, 2, dtype=torch.float32)
    routing = Routing.forced(torch.tensor([1, 0]), 2).ids
    _, mean, rstd = torch.ops.mixpert.grouped_layer_norm(x, weight, bias, *routing, 1e-6, "auto")
    torch.library.opcheck(
        torch.ops.mixpert.grouped_layer_norm_backward.default,
        (torch.ones_like(x), x, weight, bias, mean, rstd, *routing, "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_double_backward_says_that_there_is_none():
    x, weight, bias = (t.requires_grad_() for t in problem(2, 3, 4, 2))
    y = call((x, weight, bias), [1, 0])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm: double backward is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, width", [(3, 5), (1, 7), (2, 1), (7, 33)])
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(tokens, width, dtype):
    expert = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    x, weight, bias = problem(7, tokens, width, 4, dtype=dtype)
    dy = torch.randn(7, tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)

    def on(tiles):
        return run(
            lambda t: call(t, expert[tiles], backend="reference"),
            (x[tiles], weight, bias),
            dy[tiles],
        )

    whole = on(slice(None))
    for b in range(7):
        one = on(slice(b, b + 1))
        assert torch.equal(one["y"][0], whole["y"][b])
        assert torch.equal(one["x"][0], whole["x"][b])
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    assert torch.equal(on(order)["y"], whole["y"][order])
    for e in range(3):
        own = on(expert == e)
        assert torch.equal(own["weight"][e], whole["weight"][e])
        assert torch.equal(own["bias"][e], whole["bias"][e])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("experts", range(1, 9))
def test_one_expert_takes_all_and_the_others_get_exact_zeros(experts, backend):
    tensors = problem(3, 2, 5, experts, dtype=torch.float32)
    got = run(lambda t: call(t, [experts - 1] * 3, backend=backend), tensors, torch.ones(3, 2, 5))
    assert got["y"].isfinite().all()
    for name in ("weight", "bias"):
        assert got[name][-1].ne(0).any()
        assert got[name][:-1].eq(0).all()


@pytest.mark.parametrize("backend", HERE)
def test_perturbing_one_tile_or_one_expert_touches_no_other_tile(backend):
    x, weight, bias = problem(4, 3, 8, 3, dtype=torch.float32)
    before = call((x, weight, bias), [1, 0, 1, 2], backend=backend)
    x[1] = float("inf")
    after = call((x, weight, bias), [1, 0, 1, 2], backend=backend)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    weight[1] += 1
    moved = call((x, weight, bias), [1, 0, 1, 2], backend=backend)
    assert ((moved - after)[[0, 2]].abs() > 1e-3).any(-1).all()
    assert torch.equal(moved[3], after[3])


def test_autocast_computes_in_float32_and_leaves_float64_alone():
    tensors = [t.requires_grad_() for t in problem(2, 3, 8, 2, dtype=torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        y = call(tensors, [1, 0])
        assert call([t.double() for t in tensors], [1, 0]).dtype == torch.float64
    assert torch.equal(y, call([t.float() for t in tensors], [1, 0]))
    y.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in tensors)


def test_half_precision_parameters_beside_float32_features_are_widened():
    x, weight, bias = problem(2, 3, 8, 2, dtype=torch.bfloat16)
    y = call((x.float(), weight, bias), [1, 0])
    assert torch.equal(y, call((x.float(), weight.float(), bias.float()), [1, 0]))
    assert torch.equal(
        call((x.float(), weight, None), [1, 0]), call((x.float(), weight.float(), None), [1, 0])
    )


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    tensors = problem(3, 5, 8, 2, dtype=torch.float32)
    dy = torch.ones(()).expand(3, 5, 8)
    wanted = run(lambda t: call(t, [1, 0, 1], backend=backend), tensors, dy)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    leaves = [t.requires_grad_() for t in strided]
    y = call(leaves, [1, 0, 1], backend=backend)
    torch.testing.assert_close(y, wanted["y"])
    for name, gradient in zip(NAMES, torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(gradient, wanted[name])


def test_compiles_as_one_graph_for_every_route():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True)
    def function(x, weight, bias, *routing):
        return grouped_layer_norm(x, weight, bias, Routing(*routing), eps=1e-6).sin()

    tensors = [t.requires_grad_() for t in problem(4, 3, 8, 3, dtype=torch.float32)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        expert = torch.randint(3, (4,), generator=generator)
        y = function(*tensors, *Routing.forced(expert, 3)[:3])
        wanted = call(tensors, expert).sin()
        torch.testing.assert_close(y, wanted)
        got = torch.autograd.grad(y.sum(), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), tensors))
    assert graphs.frame_count == 1
