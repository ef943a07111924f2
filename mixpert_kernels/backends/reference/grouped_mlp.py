"""Defines grouped_mlp: grouped_linear twice. Backward computes the activation again from the pre-activation."""

import functools
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from . import grouped_linear as linear


def two_layers(
    linear: ModuleType,  # a backend's grouped_linear
    x: Tensor,  # (B, T, K)
    weight1: Tensor,  # (E, H, K)
    bias1: Tensor | None,  # (E, H)
    weight2: Tensor,  # (E, N, H)
    bias2: Tensor | None,  # (E, N)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, N), (B, T, H) or empty, (B, T, N) or empty
    """grouped_mlp by the grouped_linear of any backend.

    Returns y and what backward needs: the first layer's pre-activation and, with a scale, the second's output.
    """
    routing = (expert, order, offsets, cu_seqlens)
    h, pre1 = linear.grouped_linear(
        x, [weight1], _listed(bias1), *routing, activation, None, None, for_backward
    )
    y, pre2 = linear.grouped_linear(
        h, [weight2], _listed(bias2), *routing, "none", residual, scale, for_backward
    )
    return y, h if for_backward and activation == "none" else pre1, pre2


grouped_mlp = functools.partial(two_layers, linear)


def two_layers_backward(
    linear: ModuleType,
    activated: Callable[[str, Tensor, Tensor | None], Tensor],  # computes h of pre1 again
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
    """grouped_mlp_backward by the grouped_linear of any backend."""
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_scale = needs
    routing = (expert, order, offsets, cu_seqlens)
    h = activated(activation, pre1, cu_seqlens)
    dh, dweight2, dbias2, dscale = linear.grouped_linear_backward(
        dy, h, [weight2], _listed(bias2), pre2, *routing, "none", scale,
        [needs_x or needs_weight1 or needs_bias1, needs_weight2, needs_bias2, needs_scale],
    )  # fmt: skip
    dx, dweight1, dbias1 = dy.new_empty(0), [], []
    if needs_x or needs_weight1 or needs_bias1:
        dx, dweight1, dbias1, _ = linear.grouped_linear_backward(
            dh, x, [weight1], _listed(bias1), pre1, *routing, activation, None,
            [needs_x, needs_weight1, needs_bias1, False],
        )  # fmt: skip
    return [dx, *(_only(g, dy) for g in (dweight1, dbias1, dweight2, dbias2)), dscale]


grouped_mlp_backward = functools.partial(two_layers_backward, linear, linear.activate_tiles)


def _listed(bias: Tensor | None) -> list[Tensor]:
    return [] if bias is None else [bias]


def _only(grads: list[Tensor], like: Tensor) -> Tensor:
    return grads[0] if grads else like.new_empty(0)
