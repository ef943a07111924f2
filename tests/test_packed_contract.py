"""Packed rows: gradients by finite differences, opcheck, torch.compile, dtypes, layouts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from _packed import (
    DIFFERENTIABLE,
    EXPERT,
    FEATURES,
    LENGTHS,
    ROUTED,
    ROUTING,
    E,
    all_backends,
    all_ops,
    bounds,
    call,
    everything,
    problem,
    resized,
    runs_here,  # noqa: F401, a fixture of every test
    skip_unless_served,
)
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels import Routing


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op):
    lengths = (2, 1, 3) if op in ROUTING else (2, 0, 1, 3)
    small = resized(4, 3, 2)
    p = {n: t.requires_grad_() for n, t in problem(op, lengths, sizes=small).items()}

    def function(*tensors):
        results = call(
            op, dict(zip(p, tensors, strict=True)), lengths, (2, 3, 2, 0)[: len(lengths)]
        )
        return results["scores" if op == "route" else "y"]

    assert torch.autograd.gradcheck(function, tuple(p.values()))


@pytest.mark.parametrize("needs_gradient", [False, True])
@all_backends
@all_ops
def test_opcheck(op, backend, needs_gradient):
    """Forward and, where there is one, backward, as they are called."""
    p = problem(op, dtype=torch.float32)
    if needs_gradient:
        if op not in DIFFERENTIABLE:
            pytest.skip("for inference")
        p = {n: t.requires_grad_() for n, t in p.items()}
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "mixpert":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Recorder():
        results = call(op, p, backend=backend)
        if needs_gradient:
            results["scores" if op == "route" else "y"].sum().backward()
    assert len(calls) == 1 + needs_gradient
    for function, args in calls:
        assert any(isinstance(a, torch.Tensor) and torch.equal(a, bounds(LENGTHS)) for a in args)
        tests = ("test_schema", "test_faketensor")
        if function.overloadpacket.__name__ == op and op in DIFFERENTIABLE:
            args = tuple(args)
        torch.library.opcheck(function, args, test_utils=tests)


# dynamic=True takes even eps for a variable, and compiles again once the backend wants its value.
@torch._dynamo.config.patch(specialize_float=True)
@all_backends
@all_ops
def test_compiles_as_one_graph_for_any_rows_and_tiles(op, backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def function(p, expert, order, offsets, cu):
        routing = Routing(expert, order, offsets, None, cu)
        found = call(op, p, cu=cu, backend=backend, expert=routing)
        return {n: t.sin() for n, t in found.items() if n != "ids"}

    # Sizes that are alike in the first call are taken for one.
    for lengths in ((5, 3, 1, 70, 17, 8, 9), (4, 2), (3, 9, 40)):
        p = problem(op, lengths, torch.float32)
        expert = torch.arange(len(lengths), dtype=torch.int32) % 4
        routing = Routing.forced(expert, E, cu_seqlens=bounds(lengths))
        p = {n: t.requires_grad_(op in DIFFERENTIABLE) for n, t in p.items()}
        results = []
        for run in (function, function._torchdynamo_orig_callable):
            found = run(p, *routing.ids)
            results.append(list(found.values()))
            if op in DIFFERENTIABLE:
                loss = sum(t.sum() for t in found.values())
                results[-1] += torch.autograd.grad(loss, list(p.values()))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 1


@all_backends
@pytest.mark.parametrize("op", ["grouped_layer_norm", "grouped_linear", "grouped_mlp"])
def test_autocast_computes_as_if_everything_were_cast(op, backend):
    skip_unless_served(op, backend, torch.bfloat16)
    p = {n: t.requires_grad_() for n, t in problem(op, dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = call(op, p, backend=backend)["y"]
    narrow = torch.float32 if op == "grouped_layer_norm" else torch.bfloat16
    assert y.dtype == narrow
    assert torch.equal(y, call(op, {n: t.to(narrow) for n, t in p.items()}, backend=backend)["y"])
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in p.values())


@all_backends
@all_ops
def test_half_precision_parameters_beside_float32_features_are_widened(op, backend):
    p = problem(op, dtype=torch.bfloat16)
    p |= {n: p[n].float() for n in FEATURES if n in p}
    wide = {n: t.float() for n, t in p.items()}
    got, wanted = (everything(op, lambda p: call(op, p, backend=backend), q) for q in (p, wide))
    for name, t in got.items():
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(t, wanted[name].to(t.dtype), **exact, msg=name)


@all_backends
@all_ops
def test_memory_layout_does_not_matter(op, backend):
    p = problem(op, dtype=torch.float32)
    strided = {n: t.T.contiguous().T if n in FEATURES else t for n, t in p.items()}
    wanted, got = (everything(op, lambda p: call(op, p, backend=backend), q) for q in (p, strided))
    for name, t in got.items():
        close = {"rtol": 1e-6, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(t, wanted[name], **close, msg=name)


BAD = {
    "have dtype int32, got torch.int64": lambda cu: cu.long(),
    "ascend from 0 to the 93 rows of x, got [0, 6, 5, 93]": lambda _: bounds((6, -1, 88)),
    "ascend from 0 to the 93 rows of x, got [0, 90]": lambda _: bounds((90,)),
    "ascend from 0 to the 93 rows of x, got [1, 93]": lambda _: torch.tensor([1, 93]).int(),
    "have shape (B + 1,), got (7, 1)": lambda cu: cu[:, None],
    "be contiguous, got strides (2,)": lambda cu: cu.repeat_interleave(2)[::2],
    "be on the device of x, cpu, got meta": lambda cu: cu.to("meta"),
}


@pytest.mark.parametrize("message", BAD)
@all_ops
def test_bad_boundaries_are_named(op, message):
    p, cu = problem(op, dtype=torch.float32), BAD[message](bounds(LENGTHS))
    name = "route: cu_seqlens" if op in ROUTING else f"{op}: routing.cu_seqlens"
    with pytest.raises(ValueError) as error:
        call(op, p, cu=cu, expert=EXPERT[: len(cu) - 1])
    assert str(error.value) == f"{name} must {message}"


@all_ops
def test_features_that_do_not_fit_the_boundaries_are_named(op):
    p = problem(op, dtype=torch.float32)
    word = "route" if op in ROUTING else op
    with pytest.raises(ValueError) as error:
        call(op, p, None)
    assert str(error.value) == f"{word}: x must have shape (B, T, 24), got (93, 24)"
    with pytest.raises(ValueError) as error:
        call(op, p | {"x": p["x"][None]})
    assert str(error.value) == f"{word}: x must have shape (R, 24), got (1, 93, 24)"
    if op in ROUTED:
        with pytest.raises(ValueError) as error:
            call(op, p, expert=EXPERT[:4])
        assert str(error.value) == f"{op}: routing.expert must have shape (6,), got (4,)"
    if "residual" in p:
        with pytest.raises(ValueError) as error:
            call(op, p | {"residual": p["residual"][None]})
        shape = tuple(p["residual"].shape)
        assert str(error.value) == f"{op}: residual must have shape {shape}, got {(1, *shape)}"
