"""The backward of grouped_linear, which grouped_linear.py re-exports: docs/math.md in at most four launches."""

from __future__ import annotations

from torch import Tensor

from ._dx import linear_dx
from ._reduce import backward_parts, sums_by_expert
from .grouped_outer import grouped_outer


def grouped_linear_backward(
    dy: Tensor,  # (B, T, N)
    x: Tensor,  # (B, T, K)
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    pre: Tensor,  # (B, T, N) or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    activation: str,
    scale: Tensor | None,  # (E, N)
    needs: list[bool],  # of x, weights, biases, scale
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """dz and the partial sums for bias and scale; their sums by expert; dx; dW. What is not needed is not computed."""
    needs_x, needs_weight, needs_bias, needs_scale = needs
    widths, num_experts = [w.shape[1] for w in weights], weights[0].shape[0]
    none = dy.new_empty(0)
    dz, parts = backward_parts(
        dy, pre, scale, expert, activation, needs_bias, needs_scale, needs_x or needs_weight
    )
    dbiases, dscale = [], none
    if parts is not None:
        bias_widths = widths if needs_bias else []
        dtype = biases[0].dtype if needs_bias else scale.dtype
        summed = bias_widths + [sum(widths)] * needs_scale
        sums = sums_by_expert(parts, summed, order, offsets, num_experts, dtype)
        dbiases = sums[: len(bias_widths)]
        dscale = sums[-1].to(scale.dtype) if needs_scale else none
    dx = linear_dx(dz, weights, expert, order)[0] if needs_x else none
    dweights = []
    if needs_weight:
        dtype = weights[0].dtype
        dweights = grouped_outer(dz, x, widths, order, offsets, num_experts, dtype)
    return dx, dweights, dbiases, dscale
