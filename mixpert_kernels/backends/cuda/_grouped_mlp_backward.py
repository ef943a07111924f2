"""The backward of grouped_mlp, which grouped_mlp.py re-exports: multiplies with act' in the epilogue of a product."""

from __future__ import annotations

from torch import Tensor

from ._dx import linear_dx
from ._reduce import backward_parts, sum_by_expert, sums_by_expert
from .grouped_outer import grouped_outer


def grouped_mlp_backward(
    dy: Tensor,  # (B, T, N)
    x: Tensor,  # (B, T, K)
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    pre1: Tensor,  # (B, T, H)
    pre2: Tensor,  # (B, T, N) or empty
    expert: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
    scale: Tensor | None,
    needs: list[bool],  # of x, weight1, bias1, weight2, bias2, scale
) -> list[Tensor]:  # in that order, empty where not needed
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_scale = needs
    by_expert = (order, offsets, weight1.shape[0])
    grads = [x.new_empty(0) for _ in needs]
    width = dy.shape[2]
    before_scale = None if scale is None else pre2
    dz2, parts = backward_parts(dy, before_scale, scale, expert, "none", needs_bias2, needs_scale)
    if parts is not None:  # those of bias2 and scale lie side by side
        dtype = bias2.dtype if needs_bias2 else scale.dtype
        sums = sums_by_expert(parts, [width] * (needs_bias2 + needs_scale), *by_expert, dtype)
        if needs_bias2:
            grads[4] = sums[0]
        if needs_scale:
            grads[5] = sums[-1].to(scale.dtype)
    needs_first = needs_x or needs_weight1 or needs_bias1
    if not needs_first and not needs_weight2:
        return grads
    applied = activation != "none"  # else pre1 is the activation itself
    dz1, h = linear_dx(dz2, [weight2], expert, order, activation, pre1 if applied else None)
    if needs_weight2:
        h = h if applied else pre1
        (grads[3],) = grouped_outer(dz2, h, [width], *by_expert, weight2.dtype)
    if needs_bias1:
        _, parts = backward_parts(dz1, None, None, expert, "none", True, False)
        grads[2] = sum_by_expert(parts, *by_expert, bias1.dtype)
    if needs_weight1:
        (grads[1],) = grouped_outer(dz1, x, [weight1.shape[1]], *by_expert, weight1.dtype)
    if needs_x:
        grads[0], _ = linear_dx(dz1, [weight1], expert, order)
    return grads
