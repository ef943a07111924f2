"""route_grouped_linear: route, then the LayerNorm and the first linear layer of each tile's expert, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.routing import Routing

from ._checks import autocast_dtype, require, require_features, tiles_of
from ._library import register
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import check_weights, grouped_linear
from .norm_grouped_linear import check_norm
from .route import RouterWeights, Strategy, check_router, route


class RoutedLinear(NamedTuple):
    """What ``route_grouped_linear`` returns."""

    y: Tensor  # (B, T, N) or (R, N)
    routing: Routing


def route_grouped_linear(
    x: Tensor,  # (B, T, D) or (R, D)
    router: RouterWeights,
    strategy: Strategy,
    norm_weight: Tensor,  # (E, D)
    norm_bias: Tensor | None,  # (E, D)
    weight: Tensor | Sequence[Tensor],  # (E, N, D)
    bias: Tensor | Sequence[Tensor] | None,  # (E, N)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    image_of_tile: Tensor | None = None,  # (B,)
    base_tile: Tensor | None = None,  # (I,)
    expert: Tensor | None = None,  # (I,)
    router_eps: float = 1e-5,
    norm_eps: float = 1e-5,
    activation: str = "none",
    backend: str = "auto",
) -> RoutedLinear:
    """Route each image to one expert, and apply to its tiles that expert's LayerNorm and linear layer.

    ``routing = route(x)``, ``h = grouped_layer_norm(x, routing)``, ``y = grouped_linear(h, routing)`` by one backend,
    bit for bit: the start of an expert segment, whose first layer norm, query, key and value wait for the router alone.

    It is for inference. When a gradient is needed, and under autocast, the three ops run one after the other: they have
    gradients and dtypes of their own.

    Args:
        x: (B, T, D) trunk features, B tiles of T tokens, or packed rows (R, D) where ``cu_seqlens`` is given; float16,
            bfloat16, float32 or float64.
        router: of any floating dtype, computed in float32 (float64 for float64 features).
        strategy: how scores become a decision.
        norm_weight: (E, D), device and dtype of ``x``; beside float32 features also half precision, as all that follow.
        norm_bias: (E, D) or None.
        weight: (E, N, D), or a sequence of weights (E, N_i, D) whose outputs lie side by side, N = sum N_i.
        bias: (E, N), a sequence to match ``weight``, or None.
        cu_seqlens: (B + 1,) int32, ascending from 0 to R: tile ``b`` is rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` of x.
        image_of_tile: (B,) int64, ascending from 0 without gaps: the image each tile is a crop of; None: a tile is an
            image. Given together with ``base_tile``.
        base_tile: (I,) int64: the tile that shows the whole image, the one that is pooled.
        expert: (I,) integer: forced routes; scores are still computed.
        router_eps: of the router's LayerNorm.
        norm_eps: of the experts' LayerNorm.
        activation: ``none``, ``gelu`` (erf), ``gelu_tanh``, ``quick_gelu`` (z * sigmoid(1.702 z)) or ``relu``.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        RoutedLinear: ``y`` (B, T, N), or (R, N) for packed rows, in the dtype of ``x`` (of autocast, under autocast),
        sums accumulated in float32 or better; ``routing`` as ``route`` returns it.

    Raises:
        ValueError: wrong shape, dtype, device or name; what concerns the router is said in the words of ``route``.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output and the normalised features. One launch on a GPU, three for packed rows. Never waits for
        the device.

    Example:
        >>> x = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> identity = RouterWeights(torch.ones(2), torch.zeros(2), None, None, torch.eye(2), torch.zeros(2))
        >>> gain, weight = torch.ones(2, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]])
        >>> given = (identity, Strategy("direct"), gain, None, weight, None)
        >>> y, routing = route_grouped_linear(x, *given, norm_eps=0.0)
        >>> y.flatten(), routing.expert
        (tensor([1., 5.]), tensor([0, 1], dtype=torch.int32))

    Source: docs/math.md, route_grouped_linear.
    """
    weights = [weight] if weight is None or isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    images = {
        "cu_seqlens": cu_seqlens,
        "image_of_tile": image_of_tile,
        "base_tile": base_tile,
        "expert": expert,
    }
    _check_router(x, router, strategy, images, router_eps)
    separate = autocast_dtype(x) is not None
    if not separate:
        _check_layer(
            x, cu_seqlens, router, norm_weight, norm_bias, norm_eps, weights, biases, activation
        )
        tensors = [x, *router, norm_weight, norm_bias, *weights, *biases]
        separate = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
    if separate:
        routing = route(x, router, strategy, **images, eps=router_eps, backend=backend)
        h = grouped_layer_norm(x, norm_weight, norm_bias, routing, eps=norm_eps, backend=backend)
        y = grouped_linear(h, weights, biases, routing, activation=activation, backend=backend)
        return RoutedLinear(y, routing)
    y, scores, *ids = torch.ops.mixpert.route_grouped_linear(
        x,
        *images.values(),
        *router,
        router_eps,
        strategy.name,
        strategy.threshold,
        strategy.against,
        norm_weight.to(x.dtype),
        None if norm_bias is None else norm_bias.to(x.dtype),
        norm_eps,
        weights,
        biases,
        activation,
        backend,
    )
    return RoutedLinear(y, Routing(*ids, scores, cu_seqlens))


def _check_router(x, router, strategy, images, eps) -> None:
    op = "route_grouped_linear"
    require(
        isinstance(router, RouterWeights), op, "router", "be a RouterWeights", type(router).__name__
    )
    require(isinstance(strategy, Strategy), op, "strategy", "be a Strategy", strategy)
    require(eps >= 0, op, "router_eps", "be at least 0", eps)
    check_router(x, router, *images.values())


def _check_layer(x, cu_seqlens, router, gain, offset, eps, weights, biases, activation) -> None:
    op = "route_grouped_linear"
    experts, _ = check_weights(op, weights, biases, activation, x)
    require_features(op, x, weights[0].shape[2], cu_seqlens, "cu_seqlens")
    check_norm(op, x, gain, offset, eps, experts)
    routed = router.weight.shape[0]
    require(routed == experts, op, "router", f"score the weight's {experts} experts", routed)


def _run(x, cu_seqlens, image_of_tile, base_tile, expert, *rest):
    *rest, backend = rest
    widths = (x.shape[-1], sum(w.shape[1] for w in rest[13]))
    chosen = pick("route_grouped_linear", backend, widths=widths, device=x.device, dtype=x.dtype)
    return chosen.route_grouped_linear(x, cu_seqlens, image_of_tile, base_tile, expert, *rest)


def _fake(x, cu_seqlens, image_of_tile, base_tile, expert, *rest):
    *_, router_bias, _eps, _strategy, _threshold, _against = rest[:10]
    weights = rest[13]
    experts, batch = router_bias.shape[0], tiles_of(x, cu_seqlens)
    images = batch if base_tile is None else base_tile.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids = x.new_empty(batch, dtype=torch.int32)
    return (
        x.new_empty(*x.shape[:-1], sum(w.shape[1] for w in weights)),
        x.new_empty(images, experts, dtype=wide),
        ids,
        torch.empty_like(ids),
        ids.new_empty(experts + 1),
    )


_ROUTER = (
    "Tensor router_norm_weight, Tensor router_norm_bias, Tensor? router_hidden_weight, Tensor? router_hidden_bias, "
    "Tensor router_weight, Tensor router_bias, float router_eps, str strategy, float threshold, str against"
)
register(
    f"route_grouped_linear(Tensor x, Tensor? cu_seqlens, Tensor? image_of_tile, Tensor? base_tile, Tensor? expert, "
    f"{_ROUTER}, Tensor norm_weight, Tensor? norm_bias, float norm_eps, Tensor[] weights, Tensor[] biases, "
    "str activation, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
