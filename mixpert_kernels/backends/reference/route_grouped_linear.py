"""Defines route_grouped_linear: route, grouped_layer_norm, grouped_linear, one after the other."""

import functools
from collections.abc import Callable

from torch import Tensor

from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear
from .norm_grouped_linear import two_ops
from .route import route


def three_ops(
    route: Callable,
    grouped_layer_norm: Callable,
    grouped_linear: Callable,
    x: Tensor,  # (B, T, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    image_of_tile: Tensor | None,  # (B,) int64
    base_tile: Tensor | None,  # (I,) int64
    expert: Tensor | None,  # (I,) forced
    router_norm_weight: Tensor,  # (D,)
    router_norm_bias: Tensor,
    router_hidden_weight: Tensor | None,  # (h, D)
    router_hidden_bias: Tensor | None,
    router_weight: Tensor,  # (E, D or h)
    router_bias: Tensor,  # (E,)
    router_eps: float,
    strategy: str,
    threshold: float,
    against: str,
    norm_weight: Tensor,  # (E, D)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, D)
    biases: list[Tensor],  # each (E, N_i), or empty
    activation: str,
) -> tuple[Tensor, ...]:  # y (B, T, N), scores (I, E), expert, order, offsets
    """route_grouped_linear by the ops of any backend."""
    scores, _, *ids = route(
        x,
        cu_seqlens,
        image_of_tile,
        base_tile,
        expert,
        router_norm_weight,
        router_norm_bias,
        router_hidden_weight,
        router_hidden_bias,
        router_weight,
        router_bias,
        router_eps,
        strategy,
        threshold,
        against,
    )
    norm = (norm_weight, norm_bias, norm_eps)
    y = two_ops(
        grouped_layer_norm, grouped_linear, x, *norm, weights, biases, *ids, cu_seqlens, activation
    )
    return y, scores, *ids


route_grouped_linear = functools.partial(three_ops, route, grouped_layer_norm, grouped_linear)
