"""mix_streams: every backend, forward and all gradients, against a softmax-weighted sum in plain PyTorch or by hand."""

from __future__ import annotations

import functools

import _served
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.ops import mix_streams
from mixpert_kernels.testing import assert_as_accurate

HERE = [
    name
    for name in BACKENDS
    if why_not("mix_streams", name, device="cpu", dtype=torch.float32) is None
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


skip_unless_served = functools.partial(_served.skip_unless_served, "mix_streams")


def problem(count, batch, tokens, width, *, cls=True, dtype=torch.float64):
    """logits, cls (or None), streams."""
    generator = torch.Generator().manual_seed(width)
    shapes = [(batch, count), (batch, width), *[(batch, tokens, width)] * count]
    logits, first, *streams = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes
    )
    return logits, first if cls else None, *streams


def plain(logits, cls, *streams):
    g = logits.softmax(-1)
    mixed = (g[:, :, None, None] * torch.stack(streams, 1)).sum(1)
    return mixed if cls is None else torch.cat([cls[:, None], mixed], 1)


def call(tensors, backend="auto"):
    logits, cls, *streams = tensors
    return mix_streams(logits, streams, cls, backend=backend)


def run(function, tensors, dy):
    """The output and the gradients of all tensors that are not None, by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(leaves)
    names = ["logits", "cls", *(f"stream {i}" for i in range(len(tensors) - 2))]
    given = {n: t for n, t in zip(names, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), dy)
    return {"y": y.detach()} | dict(zip(given, grads, strict=True))


def upstream(tensors, seed=1):
    """dy."""
    _, cls, stream, *_ = tensors
    batch, tokens, width = stream.shape
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(batch, tokens + (cls is not None), width, generator=generator)
    return dy.to(stream.dtype)


@pytest.mark.parametrize("backend", HERE)
def test_by_hand(backend):
    """Weights 1/5 and 4/5: y = 5/5 + 40/5 = 9; dg = (5, 10), so dlogits = g (dg - 9)."""
    logits = torch.tensor([[1.0, 4.0]]).log()
    streams = [torch.full((1, 1, 1), 5.0), torch.full((1, 1, 1), 10.0)]
    leaves = [t.requires_grad_() for t in (logits, torch.full((1, 1), 3.0), *streams)]
    y = call(leaves, backend)
    torch.testing.assert_close(y.flatten(), torch.tensor([3.0, 9.0]))
    grads = torch.autograd.grad(y, leaves, torch.tensor([[[2.0], [1.0]]]))
    wanted = [[-0.8, 0.8], [2.0], [0.2], [0.8]]
    for got, numbers in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.flatten(), torch.tensor(numbers))


@given(
    count=st.integers(1, 8),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    width=st.integers(1, 5),
    cls=st.booleans(),
)
def test_equals_the_formula(count, batch, tokens, width, cls):
    tensors = problem(count, batch, tokens, width, cls=cls)
    logits, first, *streams = (None if t is None else t.numpy() for t in tensors)
    g = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.einsum("bn,nbld->bld", g, np.stack(streams))
    wanted = np.concatenate([first[:, None], wanted], 1) if cls else wanted
    np.testing.assert_allclose(call(tensors).numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "count, tokens, width, cls",
    [(3, 17, 72, True), (2, 5, 9, False), (1, 3, 8, True), (8, 2, 33, True)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, count, tokens, width, cls):
    skip_unless_served(backend, dtype)
    tensors = problem(count, 4, tokens, width, cls=cls, dtype=dtype)
    dy = upstream(tensors)
    got = run(lambda t: call(t, backend), tensors, dy)
    ours = run(lambda t: plain(*t), tensors, dy)
    truth = [None if t is None else t.double() for t in tensors]
    exact = run(lambda t: plain(*t), truth, dy.double())
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, ours[name], exact[name])
        if dtype == torch.float32 and not (name == "logits" and count == 1):
            error = (tensor - exact[name]).norm() / exact[name].norm()
            assert error < 1e-5, (name, error)


@pytest.mark.parametrize("backend", HERE)
def test_large_logits_neither_overflow_nor_lose_the_rest(backend):
    tensors = problem(3, 2, 3, 8, dtype=torch.float32)
    tensors[0][:] = torch.tensor([[-300.0, 300.0, 299.0], [-1000.0, -1000.0, -1000.0]])
    y = call(tensors, backend)
    torch.testing.assert_close(y, plain(*tensors))


@pytest.mark.parametrize("backend", HERE)
def test_float32_sums_over_streams(backend):
    """2048 + 1 is 2048 in float16; 2048 + 7 is 2055, which rounds to 2056."""
    streams = [torch.full((1, 1, 8), n).half() for n in (2048.0 * 8, *[8.0] * 7)]
    y = mix_streams(torch.zeros(1, 8).half(), streams, None, backend=backend)
    assert y.eq(2056).all()


def test_float32_sums_of_half_precision():
    """<dy, s> of the first stream is 4097, which float16 has not, of the second 0."""
    streams = [torch.ones(1, 2050, 1).half(), torch.zeros(1, 2050, 1).half()]
    dy = torch.ones(1, 2050, 1).half()
    dy[0, 0] = 2048
    logits = torch.zeros(1, 2, requires_grad=True)
    y = mix_streams(logits, streams, None, backend="reference")
    (grad,) = torch.autograd.grad(y, logits, dy)
    assert grad.tolist() == [[1024.25, -1024.25]]


@pytest.mark.parametrize("cls", [True, False])
def test_gradcheck(cls):
    tensors = problem(3, 2, 2, 3, cls=cls)
    given = [t.requires_grad_() for t in tensors if t is not None]

    def function(*given):
        return call(given if cls else (given[0], None, *given[1:]))

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend, dtype, cls):
    skip_unless_served(backend, dtype)
    logits, first, *streams = problem(2, 2, 3, 8, cls=cls, dtype=dtype)
    forward = torch.ops.mixpert.mix_streams.default
    torch.library.opcheck(forward, (logits, streams, first, backend))
    leaves = [None if t is None else t.requires_grad_() for t in (logits, first, *streams)]
    logits, first, *streams = leaves
    torch.library.opcheck(forward, (logits, streams, first, backend))
    for needs in ([True, True], [True, False], [False, True]):
        args = (
            upstream(leaves),
            logits.detach(),
            [s.detach() for s in streams],
            cls,
            needs,
            backend,
        )
        torch.library.opcheck(
            torch.ops.mixpert.mix_streams_backward.default,
            args,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_double_backward_says_that_there_is_none():
    tensors = [t.requires_grad_() for t in problem(2, 2, 3, 4)]
    (grad,) = torch.autograd.grad(call(tensors).square().sum(), tensors[2], create_graph=True)
    with pytest.raises(RuntimeError, match="mix_streams: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", HERE)
def test_only_what_needs_a_gradient_gets_one(backend):
    tensors = problem(2, 2, 3, 8, dtype=torch.float32)
    dy = upstream(tensors)
    wanted = run(lambda t: call(t, backend), tensors, dy)
    for names in (["logits"], ["cls"], ["stream 1"]):
        leaves = dict(zip(("logits", "cls", "stream 0", "stream 1"), tensors, strict=True))
        for name in names:
            leaves[name] = leaves[name].clone().requires_grad_()
        y = call(list(leaves.values()), backend)
        grads = torch.autograd.grad(y, [leaves[name] for name in names], dy)
        for name, grad in zip(names, grads, strict=True):
            assert torch.equal(grad, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, width", [(3, 5), (7, 64)])
@pytest.mark.parametrize("backend", HERE)
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(backend, tokens, width, dtype):
    skip_unless_served(backend, dtype)
    tensors = problem(3, 5, tokens, width, dtype=dtype)
    dy = upstream(tensors)

    def on(order):
        return run(lambda t: call(t, backend), [t[order] for t in tensors], dy[order])

    whole = on([0, 1, 2, 3, 4])
    for order in ([0], [3], [4, 2, 0, 3, 1]):
        for name, tensor in on(order).items():
            assert torch.equal(tensor, whole[name][order]), (name, order)


@pytest.mark.parametrize("backend", HERE)
def test_one_tile_touches_no_other(backend):
    tensors = problem(2, 3, 2, 8, dtype=torch.float32)
    dy = upstream(tensors)
    before = run(lambda t: call(t, backend), tensors, dy)
    tensors[2][1] = float("inf")
    after = run(lambda t: call(t, backend), tensors, dy)
    assert not after["y"][1, 1:].isfinite().any() and not after["logits"][1].isfinite().any()
    for name, tensor in after.items():
        assert torch.equal(tensor[[0, 2]], before[name][[0, 2]]), name


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    tensors = problem(3, 2, 5, 8, dtype=torch.float32)
    dy = upstream(tensors)
    wanted = run(lambda t: call(t, backend), tensors, torch.ones_like(dy))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors[:3]]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tensors[3:]]
    leaves = [t.detach().requires_grad_() for t in (*strided, *shifted)]
    y = call(leaves, backend)
    assert torch.equal(y, wanted["y"])
    grads = torch.autograd.grad(y, leaves, torch.ones(()).expand(dy.shape))
    for (name, tensor), grad in zip(list(wanted.items())[1:], grads, strict=True):
        assert torch.equal(grad, tensor), name


@pytest.mark.parametrize("backend", HERE)
def test_float32_logits_beside_half_precision_streams_keep_their_dtype(backend):
    logits, cls, *streams = problem(2, 2, 3, 8, dtype=torch.float16)
    logits = (logits.float() + 1e-4).requires_grad_()
    y = call((logits, cls, *streams), backend)
    assert y.dtype == torch.float16
    (grad,) = torch.autograd.grad(y.float().square().sum(), logits)
    assert grad.dtype == torch.float32 and grad.any()


def test_autocast_takes_the_streams_to_its_dtype_and_leaves_float64_alone():
    tensors = [t.requires_grad_() for t in problem(2, 2, 3, 8, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = call(tensors)
        assert call([t.double() for t in tensors]).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call([tensors[0], *(t.bfloat16() for t in tensors[1:])]))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_compiles_as_one_graph_for_every_batch():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def function(logits, cls, *streams):
        return mix_streams(logits, streams, cls).sin()

    for batch, tokens in ((2, 5), (4, 6), (5, 7)):
        tensors = [t.requires_grad_() for t in problem(3, batch, tokens, 8, dtype=torch.float32)]
        y, wanted = function(*tensors), call(tensors).sin()
        torch.testing.assert_close(y, wanted)
        got = torch.autograd.grad(y.sum(), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), tensors))
    assert graphs.frame_count == 1


LOGITS, STREAM, CLS = torch.zeros(2, 2), torch.zeros(2, 3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    "logits, streams, cls, message",
    [
        (LOGITS.int(), [STREAM] * 2, CLS, "logits must be a floating-point tensor"),
        (LOGITS, [STREAM] * 3, CLS, r"logits must have shape \(2, 3\), got \(2, 2\)"),
        (LOGITS[:1], [STREAM] * 2, CLS, r"logits must have shape \(2, 2\), got \(1, 2\)"),
        (LOGITS, STREAM, CLS, "streams must be a sequence of tensors, got a tensor"),
        (LOGITS, [], CLS, "streams must hold 1 to 8 tensors, got 0"),
        (LOGITS, [STREAM] * 9, CLS, "streams must hold 1 to 8 tensors, got 9"),
        (LOGITS, [STREAM[0]] * 2, CLS, r"streams\[0\] must have shape \(B, L, D\), got \(3, 4\)"),
        (LOGITS, [STREAM, STREAM[:, 1:]], CLS, r"streams\[1\] must have shape \(2, 3, 4\)"),
        (LOGITS, [STREAM, STREAM.half()], CLS, r"streams\[1\] must have the dtype of the streams"),
        (LOGITS, [STREAM] * 2, CLS[:, 1:], r"cls must have shape \(2, 4\), got \(2, 3\)"),
        (LOGITS, [STREAM] * 2, CLS.double(), "cls must have the dtype of the streams"),
    ],
)
def test_bad_input(logits, streams, cls, message):
    with pytest.raises(ValueError, match=f"mix_streams: {message}"):
        mix_streams(logits, streams, cls)
