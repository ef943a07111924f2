"""grouped_linear: each tile through the linear layer of its expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.backends.reference.activations import ACTIVATIONS
from mixpert_kernels.backends.reference.grouped_linear import stores_pre
from mixpert_kernels.routing import Routing

from ._checks import (
    autocast_dtype,
    require,
    require_floating,
    require_like,
    require_parameter,
    require_routed_features,
    require_routing,
    require_shape,
)
from ._library import register, register_gradient, register_no_second_gradient


def grouped_linear(
    x: Tensor,  # (B, T, K) or (R, K)
    weight: Tensor | Sequence[Tensor],  # (E, N, K)
    bias: Tensor | Sequence[Tensor] | None,  # (E, N)
    routing: Routing,
    *,
    activation: str = "none",
    residual: Tensor | None = None,  # as y
    scale: Tensor | None = None,  # (E, N)
    backend: str = "auto",
) -> Tensor:  # (B, T, N) or (R, N)
    """Apply to each tile the linear layer of its expert.

    ``y[b] = scale[e] * act(x[b] @ weight[e].T + bias[e]) + residual[b]`` with ``e = routing.expert[b]``.

    Args:
        x: (B, T, K), B tiles of T tokens, or packed rows (R, K) where ``routing.cu_seqlens`` is given; float16,
            bfloat16, float32 or float64.
        weight: (E, N, K), device and dtype of ``x``; beside float32 features also half precision, computed as float32.
            A sequence of weights (E, N_i, K) is computed as one product whose outputs lie side by side, N = sum N_i:
            so query, key and value are one GEMM of three parameters.
        bias: (E, N), a sequence to match ``weight``, or None.
        routing: which expert serves each tile.
        activation: ``none``, ``gelu`` (erf), ``gelu_tanh``, ``quick_gelu`` (z * sigmoid(1.702 z)) or ``relu``.
        residual: of the result's shape, added last.
        scale: (E, N) LayerScale, one factor a channel.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, T, N), or (R, N) for packed rows, in the dtype of ``x``; sums are accumulated in float32 (float64 for
        float64).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or name.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output, and when a gradient will be needed and an activation or scale is given, one more tensor of
        its size (the pre-activation). Never waits for the device.

    Example:
        >>> x, weight = torch.ones(2, 1, 3), torch.stack([torch.zeros(1, 3), torch.ones(1, 3)])
        >>> grouped_linear(x, weight, None, Routing.forced(torch.tensor([1, 0]), 2)).flatten()
        tensor([3., 0.])

    Source: docs/math.md, grouped_linear.
    """
    weights = [weight] if weight is None or isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    require_floating("grouped_linear", "x", x)
    if (dtype := autocast_dtype(x)) is not None:
        x, residual, scale = (None if t is None else t.to(dtype) for t in (x, residual, scale))
        weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    _check(x, weights, biases, routing, activation, residual, scale)
    tensors = [x, *weights, *biases, residual, scale]
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if for_backward:  # so that gradients come back in each parameter's own dtype
        scale = None if scale is None else scale.to(x.dtype)
        weights, biases = [w.to(x.dtype) for w in weights], [b.to(x.dtype) for b in biases]
    y, _ = torch.ops.mixpert.grouped_linear(
        x,
        weights,
        biases,
        *routing.ids,
        activation,
        residual,
        scale,
        for_backward,
        backend,
    )
    return y


def _check(x, weights, biases, routing, activation, residual, scale) -> None:
    op = "grouped_linear"
    experts, width = check_weights(op, weights, biases, activation, x)
    require_routed_features(op, x, weights[0].shape[2], routing)
    if residual is not None:
        require_shape(op, "residual", residual, *x.shape[:-1], width)
        require_like(op, "residual", residual, x)
    if scale is not None:
        require_shape(op, "scale", scale, experts, width)
        require_parameter(op, "scale", scale, x)
    require_routing(op, routing, x, experts)


def check_weights(op, weights, biases, activation, x) -> tuple[int, int]:
    """Check the layer, of which x tells device and dtype; return E and N."""
    require(activation in ACTIVATIONS, op, "activation", f"be one of {ACTIVATIONS}", activation)
    require(len(weights) > 0, op, "weight", "hold at least one tensor", "an empty sequence")
    require_shape(op, "weight", weights[0], "E", "N", "K")
    experts, _, depth = weights[0].shape
    for w in weights:
        require_shape(op, "weight", w, experts, "N", depth)
        require_parameter(op, "weight", w, x)
    if biases:
        require(len(biases) == len(weights), op, "bias", "match weight in number", len(biases))
    for w, b in zip(weights, biases, strict=False):
        require_shape(op, "bias", b, experts, w.shape[1])
        require_parameter(op, "bias", b, x)
    return experts, sum(w.shape[1] for w in weights)


def _pick(backend, x, weights):
    widths = (x.shape[-1], sum(w.shape[1] for w in weights))
    return pick("grouped_linear", backend, widths=widths, device=x.device, dtype=x.dtype)


def _run(x, weights, *rest):
    *rest, backend = rest
    return _pick(backend, x, weights).grouped_linear(x, weights, *rest)


def _fake(x, weights, *rest):
    activation, _residual, scale, keep, _backend = rest[5:]
    y = x.new_empty(*x.shape[:-1], sum(w.shape[1] for w in weights))
    return y, torch.empty_like(y) if stores_pre(activation, scale, keep) else x.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, weights, biases, *ids, activation, residual, scale, _, backend = inputs
    ctx.save_for_backward(x, *ids, scale, output[1], *weights, *biases)
    ctx.num_weights, ctx.activation, ctx.backend = len(weights), activation, backend
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _dpre):
    x, *rest = ctx.saved_tensors
    ids, (scale, pre, *rest) = rest[:4], rest[4:]
    weights, biases = rest[: ctx.num_weights], rest[ctx.num_weights :]
    needs_x, needs_weight, needs_bias, *_, needs_residual, needs_scale = ctx.needs_input_grad[:10]
    needs = [needs_x, _any(needs_weight), _any(needs_bias), needs_scale]
    dx, dweights, dbiases, dscale = torch.ops.mixpert.grouped_linear_backward(
        dy,
        x,
        weights,
        biases,
        pre,
        *ids,
        ctx.activation,
        scale,
        needs,
        ctx.backend,
    )
    return (
        dx if needs[0] else None,
        dweights if needs[1] else [None] * len(weights),
        dbiases if needs[2] else [None] * len(biases),
        *[None] * 5,
        dy if needs_residual and ctx.has_residual else None,
        dscale if needs_scale else None,
        *[None] * 2,
    )


def _any(needs: bool | Sequence[bool]) -> bool:
    return needs if isinstance(needs, bool) else any(needs)


def _run_backward(dy, x, weights, *rest):
    *rest, backend = rest
    return _pick(backend, x, weights).grouped_linear_backward(dy, x, weights, *rest)


def _fake_backward(dy, x, weights, biases, *rest):
    *_, scale, needs, _backend = rest
    needs_x, needs_weight, needs_bias, needs_scale = needs
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        [w.new_empty(w.shape) for w in weights] if needs_weight else [],
        [b.new_empty(b.shape) for b in biases] if needs_bias else [],
        scale.new_empty(scale.shape) if needs_scale else x.new_empty(0),
    )


register(
    "grouped_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor expert, Tensor order, Tensor offsets, "
    "Tensor? cu_seqlens, str activation, Tensor? residual, Tensor? scale, bool for_backward, str backend) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)
register(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] biases, Tensor pre, Tensor expert, "
    "Tensor order, Tensor offsets, Tensor? cu_seqlens, str activation, Tensor? scale, bool[] needs, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor)",
    _run_backward,
    _fake_backward,
)
register_gradient("grouped_linear", _backward, _setup_context)
register_no_second_gradient("grouped_linear")
