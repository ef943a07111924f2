"""route: pool, score, decide, sort: from features to a Routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.routing import Routing, check_expert_ids, check_ids

from ._checks import require, require_features, require_floating, require_shape, tiles_of
from ._library import register, register_gradient, register_no_second_gradient

STRATEGIES = ("direct", "score_threshold", "score_difference")
AGAINST = ("runner_up", "versatile")


@dataclass(frozen=True)
class Strategy:
    """How scores become a decision. Expert 0, the versatile one, is the fallback.

    Attributes:
        name: ``direct``: the best expert. ``score_threshold``: the best if its score >= tau, else expert 0.
            ``score_difference``: the best if its score minus the reference score >= delta, else expert 0.
        tau: 0..1, used by ``score_threshold``.
        delta: 0..1, used by ``score_difference``.
        against: the reference score: the ``runner_up``'s or the ``versatile`` expert's.

    Source: Mixpert (arXiv 2505.24541). It publishes no tau or delta: the defaults are ours, and
    ``FusedMixpertTower.calibrate`` picks them on labelled data.
    """

    name: str = "score_difference"
    tau: float = 0.5
    delta: float = 0.1
    against: str = "runner_up"

    def __post_init__(self) -> None:
        require(self.name in STRATEGIES, "route", "strategy", f"be one of {STRATEGIES}", self.name)
        require(self.against in AGAINST, "route", "against", f"be one of {AGAINST}", self.against)
        require(0 <= self.tau <= 1, "route", "tau", "lie in [0, 1]", self.tau)
        require(0 <= self.delta <= 1, "route", "delta", "lie in [0, 1]", self.delta)

    @property
    def threshold(self) -> float:
        return float(self.tau if self.name == "score_threshold" else self.delta)


class RouterWeights(NamedTuple):
    """The router's parameters: LayerNorm, then linear, or linear-GELU-linear where ``hidden_weight`` is given."""

    norm_weight: Tensor  # (D,)
    norm_bias: Tensor  # (D,)
    hidden_weight: Tensor | None  # (h, D)
    hidden_bias: Tensor | None  # (h,)
    weight: Tensor  # (E, D) or (E, h)
    bias: Tensor  # (E,)


def route(
    x: Tensor,  # (B, T, D) or (R, D)
    weights: RouterWeights,
    strategy: Strategy,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    image_of_tile: Tensor | None = None,  # (B,)
    base_tile: Tensor | None = None,  # (I,)
    expert: Tensor | None = None,  # (I,)
    eps: float = 1e-5,
    backend: str = "auto",
) -> Routing:
    """Route each image of a batch to one expert.

    ``z[i] = mean_t x[base_tile[i], t]``, ``scores[i] = softmax(router(z[i]))``, then the strategy's decision. Ties go
    to the lowest index; an image with a non-finite score goes to expert 0.

    Args:
        x: (B, T, D) trunk features, floating point, or packed rows (R, D) where ``cu_seqlens`` is given.
        weights: the router; any floating dtype, computed in float32 (float64 for float64 features).
        strategy: how scores become a decision.
        cu_seqlens: (B + 1,) int32, ascending from 0 to R: tile ``b`` is rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` of x.
            A base tile without rows is routed to expert 0.
        image_of_tile: (B,) int64, ascending from 0 without gaps: the image each tile is a crop of; None: a tile is an
            image. Given together with ``base_tile``.
        base_tile: (I,) int64: the tile that shows the whole image, the one that is pooled.
        expert: (I,) integer: forced routes (teacher routing); scores are still computed.
        eps: of the router's LayerNorm.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        Routing with int32 ``expert``, ``order``, ``offsets``, float32 ``scores`` (differentiable) and ``cu_seqlens``.

    Raises:
        ValueError: wrong shape, dtype or device; on a CPU also ids out of range and ``cu_seqlens`` that do not ascend
            from 0 to R.
        RuntimeError: no backend can run the call.

    Cost:
        Reads the base tiles once. Never waits for the device.

    Example:
        >>> x = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> identity = RouterWeights(torch.ones(2), torch.zeros(2), None, None, torch.eye(2), torch.zeros(2))
        >>> route(x, identity, Strategy("direct")).expert
        tensor([0, 1], dtype=torch.int32)

    Source: SPEC of Mixpert (arXiv 2505.24541); pooling and the router's shape are ours. docs/math.md, route.
    """
    require(isinstance(strategy, Strategy), "route", "strategy", "be a Strategy", strategy)
    require(eps >= 0, "route", "eps", "be at least 0", eps)
    check_router(x, weights, cu_seqlens, image_of_tile, base_tile, expert)
    scores, _, *routing = torch.ops.mixpert.route(
        x,
        cu_seqlens,
        image_of_tile,
        base_tile,
        expert,
        *weights,
        eps,
        strategy.name,
        strategy.threshold,
        strategy.against,
        backend,
    )
    return Routing(*routing, scores, cu_seqlens)


def check_router(x, weights, cu_seqlens, image_of_tile, base_tile, expert) -> None:
    require_floating("route", "x", x)
    norm_weight, norm_bias, hidden_weight, hidden_bias, weight, bias = weights
    for name, tensor in weights._asdict().items():
        if tensor is not None:
            require_floating("route", name, tensor)
    require_shape("route", "norm_weight", norm_weight, "D")
    width = norm_weight.shape[0]
    require_features("route", x, width, cu_seqlens, "cu_seqlens")
    require_shape("route", "norm_bias", norm_bias, width)
    require(
        (hidden_weight is None) == (hidden_bias is None),
        "route",
        "hidden_bias",
        "be given exactly when hidden_weight is",
        type(hidden_bias).__name__,
    )
    if hidden_weight is not None:
        require_shape("route", "hidden_weight", hidden_weight, "h", width)
        require_shape("route", "hidden_bias", hidden_bias, hidden_weight.shape[0])
        width = hidden_weight.shape[0]
    require_shape("route", "weight", weight, "E", width)
    require_shape("route", "bias", bias, weight.shape[0])
    require(
        (image_of_tile is None) == (base_tile is None),
        "route",
        "base_tile",
        "be given exactly when image_of_tile is",
        type(base_tile).__name__,
    )
    named = dict(weights._asdict(), image_of_tile=image_of_tile, base_tile=base_tile, expert=expert)
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ValueError(
                f"route: {name} must be on the device of x, {x.device}, got {tensor.device}"
            )
    images = batch = tiles_of(x, cu_seqlens)
    if image_of_tile is not None:
        require_shape("route", "image_of_tile", image_of_tile, batch)
        require_shape("route", "base_tile", base_tile, "I")
        images = base_tile.shape[0]
        check_ids("route", "image_of_tile", image_of_tile, images)
        check_ids("route", "base_tile", base_tile, batch)
    if expert is not None:
        check_expert_ids("route", expert, weight.shape[0])
        require_shape("route", "expert", expert, images)


def _pick(backend, x, hidden_weight, weight):
    hidden = () if hidden_weight is None else hidden_weight.shape[:1]
    widths = (x.shape[-1], *hidden, weight.shape[0])
    return pick("route", backend, widths=widths, device=x.device, dtype=x.dtype)


def _run(x, cu_seqlens, image_of_tile, base_tile, expert, *rest):
    *rest, backend = rest
    chosen = _pick(backend, x, rest[2], rest[4])
    with torch.autocast(x.device.type, enabled=False):  # scores are float32 under autocast too
        return chosen.route(x, cu_seqlens, image_of_tile, base_tile, expert, *rest)


def _fake(x, cu_seqlens, image_of_tile, base_tile, expert, *rest):
    weight, batch = rest[4], tiles_of(x, cu_seqlens)
    images = batch if base_tile is None else base_tile.shape[0]
    ids = x.new_empty(batch, dtype=torch.int32)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(images, weight.shape[0], dtype=wide),
        x.new_empty(images, x.shape[-1], dtype=wide),
        ids,
        torch.empty_like(ids),
        ids.new_empty(weight.shape[0] + 1),
    )


def _setup_context(ctx, inputs, output):
    x, cu_seqlens, _, base_tile, _, *weights, eps, _, _, _, backend = inputs
    scores, pooled, *ids = output
    ctx.mark_non_differentiable(*ids)
    ctx.save_for_backward(x, cu_seqlens, base_tile, *weights[:5], scores, pooled)
    ctx.eps, ctx.backend = eps, backend


def _backward(ctx, dscores, dpooled, *_):
    dx, *dweights = torch.ops.mixpert.route_backward(
        dscores, dpooled, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[0], ctx.backend
    )
    grads = [dx, *[None] * 4, *dweights]
    return (
        *[
            g if needed else None
            for g, needed in zip(grads, ctx.needs_input_grad[:11], strict=True)
        ],
        *[None] * 5,
    )


def _run_backward(dscores, dpooled, x, cu_seqlens, base_tile, *rest):
    *rest, backend = rest
    chosen = _pick(backend, x, rest[2], rest[4])
    with torch.autocast(x.device.type, enabled=False):
        return chosen.route_backward(dscores, dpooled, x, cu_seqlens, base_tile, *rest)


def _fake_backward(dscores, dpooled, x, cu_seqlens, base_tile, *rest):
    *weights, _scores, _pooled, _eps, needs_x, _backend = rest
    norm_weight, norm_bias, hidden_weight, hidden_bias, weight = weights
    empty = x.new_empty(0)
    return [
        x.new_empty(x.shape) if needs_x else empty,
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
        empty if hidden_weight is None else torch.empty_like(hidden_weight),
        empty if hidden_bias is None else torch.empty_like(hidden_bias),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0]),
    ]


_WEIGHTS = "Tensor norm_weight, Tensor norm_bias, Tensor? hidden_weight, Tensor? hidden_bias, Tensor weight"
register(
    f"route(Tensor x, Tensor? cu_seqlens, Tensor? image_of_tile, Tensor? base_tile, Tensor? expert, {_WEIGHTS}, "
    "Tensor bias, float eps, str strategy, float threshold, str against, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
register(
    f"route_backward(Tensor dscores, Tensor dpooled, Tensor x, Tensor? cu_seqlens, Tensor? base_tile, {_WEIGHTS}, "
    "Tensor scores, Tensor pooled, float eps, bool needs_x, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
register_gradient("route", _backward, _setup_context)
register_no_second_gradient("route")
