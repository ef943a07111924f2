"""Defines norm_grouped_linear: grouped_layer_norm, grouped_linear, one after the other."""

import functools
from collections.abc import Callable

from torch import Tensor

from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear


def two_ops(
    grouped_layer_norm: Callable,
    grouped_linear: Callable,
    x: Tensor,  # (B, T, K)
    norm_weight: Tensor,  # (E, K)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
) -> Tensor:  # (B, T, N)
    """norm_grouped_linear by the ops of any backend."""
    ids = (expert, order, offsets, cu_seqlens)
    rows, _, _ = grouped_layer_norm(x, norm_weight, norm_bias, *ids, norm_eps)
    y, _ = grouped_linear(rows, weights, biases, *ids, activation, None, None, False)
    return y


norm_grouped_linear = functools.partial(two_ops, grouped_layer_norm, grouped_linear)
