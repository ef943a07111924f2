"""grouped_adapter: every backend, forward and all gradients, against all adapters by nn.Linear, straight-through."""

from __future__ import annotations

import functools

import _served
import pytest
import torch
from torch import nn

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS
from mixpert_kernels.ops import grouped_adapter
from mixpert_kernels.testing import assert_as_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPERT = [2, 0, 2, 2, 1, 0]
LENGTHS = (5, 0, 1, 70, 17, 9)
PARAMS = ("down", "down_bias", "up", "up_bias", "scale")
TOKENS, WIDTH, HIDDEN, EXPERTS = 17, 40, 12, 4
all_backends = pytest.mark.parametrize("backend", BACKENDS)
both_forms = pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def problem(
    dtype=torch.float64,
    *,
    packed=False,
    sizes=(TOKENS, WIDTH, HIDDEN),
    experts=EXPERTS,
    expert=EXPERT,
):
    """Random tensors by name, of which ``logits`` have their largest at the expert of each tile."""
    tokens, width, hidden = sizes
    rows = (sum(LENGTHS),) if packed else (len(expert), tokens)
    shapes = {
        "x": (*rows, width),
        "down": (experts, hidden, width), "down_bias": (experts, hidden),
        "up": (experts, width, hidden), "up_bias": (experts, width),
        "scale": (experts,),
        "residual": (*rows, width),
        "logits": (len(expert), experts),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    for name in ("down", "up"):
        made[name] *= made[name].shape[-1] ** -0.5
    top = torch.tensor(expert)[:, None]
    made["logits"].scatter_(1, top, made["logits"].amax(1, keepdim=True) + 0.5)
    return {n: t if n == "logits" else t.to(dtype) for n, t in made.items()}


def leaves(p, dtype=None):
    """Copies to differentiate; the router computes in float32 whatever its features are."""
    wide = torch.promote_types(dtype or torch.float32, torch.float32)
    to = {n: wide if n == "logits" else dtype for n in p}
    return {n: t.to(to[n]).clone().requires_grad_() for n, t in p.items()}


def call(p, backend="auto", expert=EXPERT, cu_seqlens=None):
    routing = Routing.forced(torch.as_tensor(expert), len(p["scale"]), cu_seqlens=cu_seqlens)
    probabilities = p["logits"].softmax(-1) if "logits" in p else None
    options = {"residual": p.get("residual"), "probabilities": probabilities, "backend": backend}
    return grouped_adapter(p["x"], *(p[n] for n in PARAMS), routing, **options)


def dense(p, expert=EXPERT, cu_seqlens=None):
    """All adapters of all tiles, and the straight-through sum of them, as the original computes it."""
    width, hidden = p["up"].shape[1:]
    outputs = []
    for k in range(len(p["scale"])):
        layers = nn.Linear(width, hidden, device="meta"), nn.Linear(hidden, width, device="meta")
        h = torch.func.functional_call(
            layers[0], {"weight": p["down"][k], "bias": p["down_bias"][k]}, p["x"]
        )
        o = torch.func.functional_call(
            layers[1], {"weight": p["up"][k], "bias": p["up_bias"][k]}, h.relu()
        )
        outputs.append(o * p["scale"][k])
    softmax = p["logits"].softmax(-1)
    onehot = torch.zeros_like(softmax).scatter_(1, softmax.argmax(-1, keepdim=True), 1)
    gates = onehot - softmax.detach() + softmax
    assert torch.equal(softmax.argmax(-1), torch.tensor(expert))
    lengths = (
        torch.full((len(gates),), p["x"].shape[-2]) if cu_seqlens is None else cu_seqlens.diff()
    )
    gates = gates.repeat_interleave(lengths, 0).view(*p["x"].shape[:-1], -1)  # (B, T, E)
    y = sum(gates[..., k, None].to(o.dtype) * o for k, o in enumerate(outputs))
    return y + p["residual"]


def run(function, start, dtype, dy):
    """Output, output without gradients, and all gradients, by name."""
    p = leaves(start, dtype)
    y = function(p)
    with torch.no_grad():
        inference = function(p)
    found = {"y": y.detach(), "y without gradient": inference}
    grads = torch.autograd.grad(y, list(p.values()), dy.to(dtype))
    return found | {f"d{n}": g for n, g in zip(p, grads, strict=True)}


skip_unless_served = functools.partial(_served.skip_unless_served, "grouped_adapter")


def test_by_hand():
    x = torch.tensor([[[1.0]], [[-2.0]], [[-1.0]]])
    down, down_bias = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[0.0], [1.0]])
    up, up_bias = torch.tensor([[[10.0]], [[100.0]]]), torch.tensor([[1.0], [2.0]])
    scale, residual = torch.tensor([2.0, -1.0]), torch.tensor([[[0.5]], [[0.25]], [[0.0]]])
    p = torch.full((3, 2), 0.5, requires_grad=True)
    routing = Routing.forced(torch.tensor([0, 1, 0]), 2)
    y = grouped_adapter(
        x, down, down_bias, up, up_bias, scale, routing, residual=residual, probabilities=p
    )
    # 2 (10 relu(3) + 1) + 0.5 ; -(100 relu(2 + 1) + 2) + 0.25 ; 2 (10 relu(-3) + 1)
    assert y.flatten().tolist() == [62.5, -301.75, 2.0]
    y.backward(torch.tensor([[[1.0]], [[10.0]], [[1.0]]]))
    # both adapters of every tile: 62, -(100 relu(-1 + 1) + 2) ; 10 * 2, 10 * -302 ; 2, -202
    assert p.grad.tolist() == [[62.0, -2.0], [20.0, -3020.0], [2.0, -202.0]]


@both_forms
@all_backends
def test_equals_all_adapters_and_a_straight_through_one_hot(backend, packed):
    """1e-5 relative in float32: the output and the gradients of features, parameters, residual and logits."""
    skip_unless_served(backend)
    start, cu = problem(packed=packed), bounds(LENGTHS) if packed else None
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1))
    got = run(lambda p: call(p, backend, cu_seqlens=cu), start, torch.float32, dy)
    truth = run(lambda p: dense(p, cu_seqlens=cu), start, torch.float64, dy)
    for name, tensor in got.items():
        error = (tensor - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= 1e-5, (name, error)
    assert got["dlogits"].ne(0).all() or packed  # a tile without rows has no gradient


@both_forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_backends
def test_is_as_accurate_as_plain_pytorch(backend, dtype, packed):
    skip_unless_served(backend, dtype)
    start, cu = problem(dtype, packed=packed), bounds(LENGTHS) if packed else None
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = run(lambda p: call(p, backend, cu_seqlens=cu), start, dtype, dy)
    plain, truth = (
        run(lambda p: dense(p, cu_seqlens=cu), start, d, dy) for d in (dtype, torch.float64)
    )
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, plain[name], truth[name])


@all_backends
def test_features_get_the_chosen_adapters_gradient_alone(backend):
    """Probabilities to differentiate change no other gradient, bit for bit."""
    skip_unless_served(backend)
    start = problem(torch.float32)
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1))
    with_router = run(lambda p: call(p, backend), start, torch.float32, dy)
    del start["logits"]
    for name, tensor in run(lambda p: call(p, backend), start, torch.float32, dy).items():
        assert torch.equal(tensor, with_router[name]), name


@all_backends
def test_adapters_without_a_sample_get_exact_zeros(backend):
    skip_unless_served(backend)
    start, dy = problem(torch.float32, expert=[1] * 6), torch.ones(6, TOKENS, WIDTH)
    got = run(lambda p: call(p, backend, [1] * 6), start, torch.float32, dy)
    for name in PARAMS:
        assert got[f"d{name}"][1].ne(0).any()
        assert got[f"d{name}"][[0, 2, 3]].eq(0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_backends
def test_zero_up_projections_give_the_residual_bitwise(backend, dtype):
    """Also its negative zeros, beside negative scales, and with hidden numbers that are large."""
    skip_unless_served(backend, dtype)
    p = problem(dtype)
    p["up"].zero_()
    p["up_bias"].zero_()
    p["x"] *= 100
    p["residual"][:, :, ::3] = -0.0
    y = call(p, backend)
    assert torch.equal(y.view(torch.uint8), p["residual"].view(torch.uint8))


@pytest.mark.parametrize("frozen", ["x", "down", "scale", "logits"])
@all_backends
def test_a_frozen_argument_gets_no_gradient_and_changes_no_other(backend, frozen):
    skip_unless_served(backend)
    start, dy = problem(torch.float32), torch.ones(6, TOKENS, WIDTH)
    wanted = run(lambda p: call(p, backend), start, torch.float32, dy)
    p = leaves(start, torch.float32)
    p[frozen].requires_grad_(False)
    call(p, backend).backward(dy)
    assert p.pop(frozen).grad is None
    for name, tensor in p.items():
        assert torch.equal(tensor.grad, wanted[f"d{name}"]), name


def test_gradcheck():
    """Of what does not go straight through: the numbers behind probabilities are not in the result."""
    for expert, lengths in (([1, 0, 1], None), ([0, 2, 1, 0, 2, 2], (1, 0, 3, 1, 2, 1))):
        p = problem(expert=expert, experts=3, sizes=(2, 3, 4))
        cu = None
        if lengths is not None:
            cu = bounds(lengths)
            p |= {n: p[n].flatten(0, 1)[: sum(lengths)] for n in ("x", "residual")}
        del p["logits"]
        p = leaves(p)
        names = list(p)

        def function(*tensors, names=names, expert=expert, cu=cu):
            return call(dict(zip(names, tensors, strict=True)), "reference", expert, cu)

        assert torch.autograd.gradcheck(function, tuple(p.values()))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_sample_is_bitwise_the_same_in_any_batch_and_order(backend):
    """Output, and the gradients that are its own."""
    skip_unless_served(backend)
    start = problem(torch.float32)
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1))
    own = ("x", "residual", "logits")

    def part(samples):
        p = {n: t[samples] if n in own else t for n, t in start.items()}
        expert = [EXPERT[b] for b in samples]
        found = run(lambda p: call(p, backend, expert), p, torch.float32, dy[samples])
        return {n: found[n] for n in ("y", "dx", "dlogits")}

    whole = part([0, 1, 2, 3, 4, 5])
    for samples in ([3], [5, 2, 0, 1, 4, 3]):
        for name, tensor in part(samples).items():
            assert torch.equal(tensor, whole[name][samples]), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_packed_tiles_of_one_size_give_the_bits_of_a_uniform_batch(backend):
    skip_unless_served(backend)
    start, cu = problem(torch.float32), bounds([TOKENS] * 6)
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1))
    flat = start | {n: start[n].flatten(0, 1) for n in ("x", "residual")}
    uniform = run(lambda p: call(p, backend), start, torch.float32, dy)
    got = run(lambda p: call(p, backend, cu_seqlens=cu), flat, torch.float32, dy.flatten(0, 1))
    for name in ("y", "y without gradient", "dx", "dlogits"):
        assert torch.equal(got[name].view(uniform[name].shape), uniform[name]), name


@both_forms
@pytest.mark.parametrize("for_backward", [False, True])
@all_backends
def test_opcheck(backend, for_backward, packed):
    skip_unless_served(backend)
    p = problem(torch.float32, packed=packed)
    p = leaves(p, torch.float32) if for_backward else p
    routing = Routing.forced(torch.tensor(EXPERT), 4, None, bounds(LENGTHS) if packed else None)
    probabilities = p["logits"].float() if for_backward else None
    tensors = [p["x"], *(p[n] for n in PARAMS), *routing.ids, p["residual"], probabilities]
    torch.library.opcheck(
        torch.ops.mixpert.grouped_adapter.default, (*tensors, for_backward, backend)
    )


def test_compiles_into_one_graph():
    start = problem(torch.float32)
    dy = torch.randn(start["x"].shape, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(lambda p: call(p), fullgraph=True, backend="aot_eager", dynamic=True)
    wanted = run(call, start, torch.float32, dy)
    for name, tensor in run(compiled, start, torch.float32, dy).items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_double_backward_says_that_there_is_none():
    p = leaves(problem())
    (dx,) = torch.autograd.grad(call(p).square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_adapter: double backward is not supported"):
        dx.sum().backward()


def test_autocast_computes_as_if_everything_were_cast():
    p = leaves(problem(torch.float32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p)
    assert y.dtype == torch.bfloat16
    cast = {n: t if n == "logits" else t.bfloat16() for n, t in p.items()}
    assert torch.equal(y, call(cast))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in p.values())


BAD = {
    "down must have shape (E, H, D), got (2, 4)": {"down": torch.ones(2, 4)},
    "down must have at most 128 hidden numbers, got 129": {"down": torch.ones(2, 129, 3)},
    "down_bias must have shape (2, 4), got (2, 5)": {"down_bias": torch.ones(2, 5)},
    "up must have shape (2, 3, 4), got (2, 4, 3)": {"up": torch.ones(2, 4, 3)},
    "up_bias must have shape (2, 3), got (3,)": {"up_bias": torch.ones(3)},
    "scale must have shape (2,), got (3,)": {"scale": torch.ones(3)},
    "x must have shape (B, T, 3), got (1, 2, 4)": {"x": torch.ones(1, 2, 4)},
    "x must have shape (B, T, 3), got (2, 3)": {"x": torch.ones(2, 3)},
    "residual must have shape (1, 2, 3), got (1, 1, 3)": {"residual": torch.ones(1, 1, 3)},
    "residual must have the dtype of x, torch.float32, got torch.float64": {
        "residual": torch.ones(1, 2, 3).double()
    },
    "scale must have the dtype of x, torch.float32, got torch.float64": {
        "scale": torch.ones(2).double()
    },
    "probabilities must have shape (1, 2), got (2, 2)": {"probabilities": torch.ones(2, 2)},
    "probabilities must be a floating-point tensor, got torch.int64": {
        "probabilities": torch.ones(1, 2).long()
    },
    "routing must be over the weight's 2 experts, got 3": {
        "routing": Routing.forced(torch.zeros(1).long(), 3)
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    arguments = {
        "x": torch.ones(1, 2, 3),
        "down": torch.ones(2, 4, 3),
        "down_bias": torch.ones(2, 4),
        "up": torch.ones(2, 3, 4),
        "up_bias": torch.ones(2, 3),
        "scale": torch.ones(2),
        "routing": Routing.forced(torch.zeros(1).long(), 2),
    }
    with pytest.raises(ValueError) as error:
        grouped_adapter(**arguments | BAD[message])
    assert str(error.value).startswith(f"grouped_adapter: {message}")
