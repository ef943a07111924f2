"""Whether a backend computes what the reference does: asked before it is timed."""

from __future__ import annotations

import torch

from mixpert_kernels import Routing
from mixpert_kernels.testing import error_and_bound

from .calls import Call, Tensors

BATCHED = ("x", "residual")
# Times what the tests allow on small shapes: of millions of sums the largest error is chance, and a backend that is
# less accurate by a few roundings is not wrong. oneDNN's float32 products of K = 1152 came to 1.05 of the tests' bound.
LENIENT = 2.0


def why_wrong(
    call: Call, backend: str, t: Tensors, routing: Routing, training: bool = False
) -> str | None:
    """Say what is wrong with a backend's result; None if it is right.

    The first and the last tile may be ``2 * LENIENT`` times as far from float64 as the reference is in the same dtype,
    plus roundings of the largest value; any other tile as far from the reference as these two distances together.
    ``training``: the gradients of the first and the last tile instead.
    """
    if backend == "reference":
        return None
    ends = sorted({0, len(t["x"]) - 1})
    few = {name: tensor[ends] if name in BATCHED else tensor for name, tensor in t.items()}
    routing_of_few = Routing.forced(routing.expert[ends], routing.num_experts)
    wide = {name: tensor.double() for name, tensor in few.items()}
    try:
        if training:
            got = _gradients(call, few, routing_of_few, backend)
        else:
            with torch.no_grad():
                got = call.run(t, routing, backend)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel may fail in any way, and the others are still to be timed
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if training:
        plain = _gradients(call, few, routing_of_few, "reference")
        return _compare(got, plain, _gradients(call, wide, routing_of_few, "reference"), None)
    with torch.no_grad():
        plain = call.run(t, routing, "reference")
        return _compare(got, plain, call.run(wide, routing_of_few, "reference"), ends)


def _gradients(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    with torch.enable_grad():
        y = next(iter(call.run(leaves, routing, backend).values()))
        generator = torch.Generator(y.device).manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, device=y.device)
        dy = (16 * dy).round() / 16  # the same numbers in every dtype
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _compare(got: Tensors, plain: Tensors, truth: Tensors, ends: list[int] | None) -> str | None:
    """``ends``: the tiles ``truth`` is of; None: all of them."""
    for name, tensor in got.items():
        if not tensor.is_floating_point():
            if not torch.equal(tensor, plain[name]):
                return f"wrong: {name} differs from the reference's"
            continue
        if ends is None:
            error, allowed = error_and_bound(tensor, plain[name], truth[name])
        else:
            error, allowed = error_and_bound(tensor[ends], plain[name][ends], truth[name])
        near, allowed = allowed, LENIENT * allowed
        if not error <= allowed:  # so written that NaN fails
            return f"wrong: {name} is off by {error:.1e}, allowed {allowed:.1e}"
        if ends is not None:
            apart = (tensor.double() - plain[name].double()).abs().max().item()
            if not apart <= near + allowed:
                return f"wrong: {name} is {apart:.1e} from the reference's, allowed {near + allowed:.1e}"
    return None
