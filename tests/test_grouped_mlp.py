"""grouped_mlp: every backend, forward and all gradients, against plain PyTorch and against two grouped_linear."""

from __future__ import annotations

import functools

import _served
import pytest
import torch
import torch.nn.functional as F

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS
from mixpert_kernels.ops import grouped_linear, grouped_mlp
from mixpert_kernels.testing import assert_as_accurate

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = [(), ("scale",), ("bias1", "residual"), ("bias1", "bias2", "residual", "scale")]
EXPERT = [2, 0, 2, 2, 1, 0]
TENSORS = ("x", "weight1", "bias1", "weight2", "bias2")


def act(name, z):
    functions = {
        "none": lambda z: z,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
        "relu": F.relu,
    }
    return functions[name](z)


def problem(dtype=torch.float64, *, expert=EXPERT, experts=4, sizes=(17, 24, 40, 16), without=()):
    """Random tensors by name; sizes are T, K, H, N."""
    tokens, depth, hidden, width = sizes
    shapes = {
        "x": (len(expert), tokens, depth),
        "weight1": (experts, hidden, depth),
        "bias1": (experts, hidden),
        "weight2": (experts, width, hidden),
        "bias2": (experts, width),
        "residual": (len(expert), tokens, width),
        "scale": (experts, width),
    }
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {n: None if n in without else t.to(dtype) for n, t in made.items()}


def leaves(p, dtype=None):
    return {n: None if t is None else t.to(dtype).clone().requires_grad_() for n, t in p.items()}


def call(p, activation="gelu", backend="auto", expert=EXPERT):
    routing = Routing.forced(torch.as_tensor(expert), p["weight1"].shape[0])
    options = {"residual": p["residual"], "scale": p["scale"]}
    return grouped_mlp(
        *(p[n] for n in TENSORS), routing, activation=activation, backend=backend, **options
    )


def two_calls(p, activation="gelu", backend="auto", expert=EXPERT):
    routing = Routing.forced(torch.as_tensor(expert), p["weight1"].shape[0])
    h = grouped_linear(
        p["x"], p["weight1"], p["bias1"], routing, activation=activation, backend=backend
    )
    options = {"residual": p["residual"], "scale": p["scale"], "backend": backend}
    return grouped_linear(h, p["weight2"], p["bias2"], routing, **options)


def plain(p, activation, expert=EXPERT):
    def row(name, e):
        return None if p[name] is None else p[name][e]

    y = []
    for b, e in enumerate(expert):
        h = act(activation, F.linear(p["x"][b], p["weight1"][e], row("bias1", e)))
        z = F.linear(h, p["weight2"][e], row("bias2", e))
        z = z if p["scale"] is None else z * p["scale"][e]
        y.append(z if p["residual"] is None else z + p["residual"][b])
    return torch.stack(y)


def gradients(p, y, dy):
    names = [n for n, t in p.items() if t is not None]
    return dict(zip(names, torch.autograd.grad(y, [p[n] for n in names], dy), strict=True))


skip_unless_served = functools.partial(_served.skip_unless_served, "grouped_mlp")


def test_by_hand():
    x = torch.tensor([[[1.0]], [[-2.0]]])
    weight1, bias1 = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[0.0], [1.0]])
    weight2, bias2 = torch.tensor([[[10.0]], [[100.0]]]), torch.tensor([[1.0], [2.0]])
    routing = Routing.forced(torch.tensor([0, 1]), 2)
    y = grouped_mlp(x, weight1, bias1, weight2, bias2, routing, activation="relu")
    # 10 relu(3) + 1 ; 100 relu(2 + 1) + 2
    assert y.flatten().tolist() == [31.0, 302.0]


@pytest.mark.parametrize("without", OPTIONAL, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, activation, without):
    skip_unless_served(backend, dtype)
    start = problem(dtype, without=without)
    dy = torch.randn(6, 17, 16, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(function, dtype):
        p = leaves(start, dtype)
        y = function(p)
        with torch.no_grad():
            inference = function(p)
        return {"y": y.detach(), "y without gradient": inference} | gradients(p, y, dy.to(dtype))

    got = run(lambda p: call(p, activation, backend), dtype)
    ours, truth = (run(lambda p: plain(p, activation), d) for d in (dtype, torch.float64))
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, ours[name], truth[name])


@pytest.mark.parametrize("without", OPTIONAL, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_two_grouped_linear_bitwise(activation, without):
    """On the reference, forward and every gradient."""
    start = problem(torch.float32, without=without)
    dy = torch.randn(6, 17, 16, generator=torch.Generator().manual_seed(1))
    got, wanted = leaves(start, torch.float32), leaves(start, torch.float32)
    y, y_two = call(got, activation, "reference"), two_calls(wanted, activation, "reference")
    assert torch.equal(y, y_two)
    for name, gradient in gradients(wanted, y_two, dy).items():
        assert torch.equal(gradients(got, call(got, activation, "reference"), dy)[name], gradient)


@pytest.mark.parametrize("without", OPTIONAL, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, without):
    p = leaves(problem(expert=[1, 0, 1], experts=3, sizes=(2, 3, 4, 2), without=without))
    names = [n for n, t in p.items() if t is not None]

    def function(*tensors):
        return call(p | dict(zip(names, tensors, strict=True)), activation, expert=[1, 0, 1])

    assert torch.autograd.gradcheck(function, tuple(p[n] for n in names))


@pytest.mark.parametrize("frozen", ["x", "weight1", "bias1", "weight2", "bias2", "scale"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_argument_gets_no_gradient_and_changes_no_other(backend, frozen):
    skip_unless_served(backend, torch.float32)
    dy = torch.ones(6, 17, 16)
    p = leaves(problem(torch.float32), torch.float32)
    wanted = gradients(p, call(p, "gelu", backend), dy)
    p[frozen].requires_grad_(False)
    call(p, "gelu", backend).backward(dy)
    assert p.pop(frozen).grad is None
    for name, tensor in p.items():
        assert torch.equal(tensor.grad, wanted[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_keeps_the_pre_activation_and_not_the_activation(backend):
    """Of the (B, T, H) tensors one is kept, and it is none of the activations."""
    skip_unless_served(backend, torch.float32)
    p = leaves(problem(torch.float32, without=("scale",)), torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(p, "gelu", backend)
    hidden = [t for t in kept if t.shape == (6, 17, 40)]
    assert len(hidden) == 1
    pre = [F.linear(p["x"][b], p["weight1"][e], p["bias1"][e]) for b, e in enumerate(EXPERT)]
    torch.testing.assert_close(hidden[0], torch.stack(pre), rtol=1e-5, atol=1e-5)
    assert not [t for t in kept if t.shape == (6, 17, 16)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_a_tile_get_exact_zeros(backend):
    skip_unless_served(backend, torch.float32)
    p = leaves(problem(torch.float32), torch.float32)
    y = call(p, "gelu", backend, expert=[1] * 6)
    grads = gradients(p, y, torch.ones_like(y))
    for name in ("weight1", "bias1", "weight2", "bias2", "scale"):
        assert grads[name][1].ne(0).any()
        assert grads[name][[0, 2, 3]].eq(0).all(), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(backend):
    skip_unless_served(backend, torch.float32)
    p = problem(torch.float32)
    dy = torch.randn(6, 17, 16, generator=torch.Generator().manual_seed(1))

    def run(tiles):
        part = p | {n: p[n][tiles] for n in ("x", "residual")}
        part = leaves(part, torch.float32)
        y = call(part, "gelu_tanh", backend, [EXPERT[b] for b in tiles])
        return y.detach(), gradients(part, y, dy[tiles])["x"]

    y, dx = run([0, 1, 2, 3, 4, 5])
    for tiles in ([3], [5, 2, 0, 1, 4, 3]):
        y_part, dx_part = run(tiles)
        assert torch.equal(y_part, y[tiles]) and torch.equal(dx_part, dx[tiles])


@pytest.mark.parametrize("for_backward", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, activation, for_backward):
    skip_unless_served(backend, torch.float32)
    p = problem(torch.float32)
    p = leaves(p, torch.float32) if for_backward else p
    routing = Routing.forced(torch.tensor(EXPERT), 4)
    tensors = [p[n] for n in TENSORS]
    args = (*tensors, *routing.ids, activation, p["residual"], p["scale"], for_backward, backend)
    torch.library.opcheck(torch.ops.mixpert.grouped_mlp.default, args)


def test_double_backward_says_that_there_is_none():
    p = leaves(problem())
    (dx,) = torch.autograd.grad(call(p).square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_mlp: double backward is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_computes_as_if_everything_were_cast(backend):
    p = leaves(problem(torch.float32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p, "gelu", backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call({n: t.bfloat16() for n, t in p.items()}, "gelu", backend))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in p.values())


BAD = {
    "activation must be one of": {"activation": "swish"},
    "weight1 must have shape (E, H, K), got (2, 4)": {"weight1": torch.ones(2, 4)},
    "weight2 must have shape (2, N, 4), got (3, 5, 4)": {"weight2": torch.ones(3, 5, 4)},
    "x must have shape (B, T, 3), got (1, 2, 4)": {"x": torch.ones(1, 2, 4)},
    "bias1 must have shape (2, 4), got (2, 5)": {"bias1": torch.ones(2, 5)},
    "bias2 must have shape (2, 5), got (2, 4)": {"bias2": torch.ones(2, 4)},
    "scale must have shape (2, 5), got (5,)": {"scale": torch.ones(5)},
    "residual must have shape (1, 2, 5), got (1, 1, 5)": {"residual": torch.ones(1, 1, 5)},
    "weight2 must have the dtype of x, torch.float32, got torch.float64": {
        "weight2": torch.ones(2, 5, 4).double()
    },
    "routing must be over the weight's 2 experts, got 3": {
        "routing": Routing.forced(torch.zeros(1).long(), 3)
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    arguments = {
        "x": torch.ones(1, 2, 3),
        "weight1": torch.ones(2, 4, 3),
        "bias1": None,
        "weight2": torch.ones(2, 5, 4),
        "bias2": None,
        "routing": Routing.forced(torch.zeros(1).long(), 2),
    }
    with pytest.raises(ValueError) as error:
        grouped_mlp(**arguments | BAD[message])
    assert str(error.value).startswith(f"grouped_mlp: {message}")
