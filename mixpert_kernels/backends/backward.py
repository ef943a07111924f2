"""The order of the backward's launches (docs/math.md), which the GPU backends share; launches are each one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Pieces(NamedTuple):
    """A backend's launches; what they take and return stands at their definitions."""

    backward_parts: Callable[..., tuple[Any, Any]]  # dz and the partial sums for bias and scale
    sums_by_expert: Callable[..., list[Tensor]]
    linear_dx: Callable[..., tuple[Any, Any]]
    grouped_outer: Callable[..., list[Tensor]]


def linear_backward(
    pieces: Pieces,
    dy: Tensor,  # (B, T, N)
    x: Tensor,  # (B, T, K)
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    pre: Tensor,  # (B, T, N) or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    scale: Tensor | None,  # (E, N)
    needs: list[bool],  # of x, weights, biases, scale
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """dz and the partial sums for bias and scale; their sums by expert; dx; dW. What is not needed is not computed."""
    needs_x, needs_weight, needs_bias, needs_scale = needs
    widths, by_expert = [w.shape[1] for w in weights], (order, offsets, weights[0].shape[0])
    none, packed, needs_dz = dy.new_empty(0), {"cu_seqlens": cu_seqlens}, needs_x or needs_weight
    dz, parts = pieces.backward_parts(
        dy, pre, scale, expert, activation, needs_bias, needs_scale, needs_dz, **packed
    )
    dbiases, dscale = [], none
    if parts is not None:
        bias_widths = widths if needs_bias else []
        dtype = biases[0].dtype if needs_bias else scale.dtype
        summed = bias_widths + [sum(widths)] * needs_scale
        sums = pieces.sums_by_expert(parts, summed, *by_expert, dtype, **packed)
        dbiases = sums[: len(bias_widths)]
        dscale = sums[-1].to(scale.dtype) if needs_scale else none
    dx = none
    if needs_x:
        dx, _ = pieces.linear_dx(dz, weights, expert, order, **packed)
    dweights = []
    if needs_weight:
        dtype = weights[0].dtype
        dweights = pieces.grouped_outer(dz, x, widths, *by_expert, dtype, **packed)
    return dx, dweights, dbiases, dscale


def mlp_backward(
    pieces: Pieces,
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
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    scale: Tensor | None,
    needs: list[bool],  # of x, weight1, bias1, weight2, bias2, scale
) -> list[Tensor]:  # in that order, empty where not needed
    """As above for either layer, but that act' of the first is the epilogue of the second's dx."""
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_scale = needs
    by_expert = (order, offsets, weight1.shape[0])
    grads = [x.new_empty(0) for _ in needs]
    width, hidden = dy.shape[-1], [weight1.shape[1]]
    packed = {"cu_seqlens": cu_seqlens}
    before_scale = None if scale is None else pre2
    dz2, parts = pieces.backward_parts(
        dy, before_scale, scale, expert, "none", needs_bias2, needs_scale, **packed
    )
    if parts is not None:  # those of bias2 and scale lie side by side
        dtype = bias2.dtype if needs_bias2 else scale.dtype
        sums = pieces.sums_by_expert(
            parts, [width] * (needs_bias2 + needs_scale), *by_expert, dtype, **packed
        )
        if needs_bias2:
            grads[4] = sums[0]
        if needs_scale:
            grads[5] = sums[-1].to(scale.dtype)
    needs_first = needs_x or needs_weight1 or needs_bias1
    if not needs_first and not needs_weight2:
        return grads
    applied = activation != "none"  # else pre1 is the activation itself
    before = pre1 if applied else None
    dz1, h = pieces.linear_dx(dz2, [weight2], expert, order, activation, before, **packed)
    if needs_weight2:
        h = h if applied else pre1
        (grads[3],) = pieces.grouped_outer(dz2, h, [width], *by_expert, weight2.dtype, **packed)
    if needs_bias1:
        _, parts = pieces.backward_parts(dz1, None, None, expert, "none", True, False, **packed)
        (grads[2],) = pieces.sums_by_expert(parts, hidden, *by_expert, bias1.dtype, **packed)
    if needs_weight1:
        (grads[1],) = pieces.grouped_outer(dz1, x, hidden, *by_expert, weight1.dtype, **packed)
    if needs_x:
        grads[0], _ = pieces.linear_dx(dz1, [weight1], expert, order, **packed)
    return grads
