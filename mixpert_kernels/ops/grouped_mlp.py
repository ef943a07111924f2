"""grouped_mlp: each tile through the two linear layers of its expert, and the activation between them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.backends.reference.activations import ACTIVATIONS
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


def grouped_mlp(
    x: Tensor,  # (B, T, K) or (R, K)
    weight1: Tensor,  # (E, H, K)
    bias1: Tensor | None,  # (E, H)
    weight2: Tensor,  # (E, N, H)
    bias2: Tensor | None,  # (E, N)
    routing: Routing,
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,  # as y
    scale: Tensor | None = None,  # (E, N)
    backend: str = "auto",
) -> Tensor:  # (B, T, N) or (R, N)
    """Apply to each tile the two linear layers of its expert.

    ``y[b] = scale[e] * (act(x[b] @ weight1[e].T + bias1[e]) @ weight2[e].T + bias2[e]) + residual[b]`` with
    ``e = routing.expert[b]``: two ``grouped_linear`` in inference and the same result. In training it keeps the first
    layer's pre-activation alone, not its activation, which backward computes again on the way.

    Args:
        x: (B, T, K), B tiles of T tokens, or packed rows (R, K) where ``routing.cu_seqlens`` is given; float16,
            bfloat16, float32 or float64.
        weight1: (E, H, K), device and dtype of ``x``; beside float32 features also half precision, as all parameters.
        bias1: (E, H) or None.
        weight2: (E, N, H).
        bias2: (E, N) or None.
        routing: which expert serves each tile.
        activation: ``none``, ``gelu`` (erf), ``gelu_tanh``, ``quick_gelu`` (z * sigmoid(1.702 z)) or ``relu``.
        residual: of the result's shape, added last.
        scale: (E, N), LayerScale.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, T, N), or (R, N) for packed rows, in the dtype of ``x`` (of autocast, under autocast); products accumulate
        in float32 or better.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or an unknown activation.
        RuntimeError: no backend can run the call, or a gradient of a gradient is asked for.

    Cost:
        Memory: the output and H numbers a token; when a gradient will be needed those stay, and with a scale N more.
        Two launches. Never waits for the device.

    Example:
        >>> x, one = torch.ones(2, 1, 1), torch.ones(2, 1, 1)
        >>> weight2 = torch.tensor([[[2.0]], [[3.0]]])
        >>> routing = Routing.forced(torch.tensor([1, 0]), 2)
        >>> grouped_mlp(x, -one, None, weight2, None, routing, activation="none").flatten()
        tensor([-3., -2.])

    Source: docs/math.md, grouped_mlp.
    """
    require_floating("grouped_mlp", "x", x)
    params = (weight1, bias1, weight2, bias2, scale)
    if (dtype := autocast_dtype(x)) is not None:
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
        params = tuple(None if p is None else p.to(dtype) for p in params)
    _check(x, *params[:4], routing, activation, residual, params[4])
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, *params)
    )
    if for_backward:  # so that gradients come back in each parameter's own dtype
        params = tuple(None if p is None else p.to(x.dtype) for p in params)
    *layers, scale = params
    y, _, _ = torch.ops.mixpert.grouped_mlp(
        x, *layers, *routing.ids, activation, residual, scale, for_backward, backend
    )
    return y


def _check(x, weight1, bias1, weight2, bias2, routing, activation, residual, scale) -> None:
    op = "grouped_mlp"
    require(activation in ACTIVATIONS, op, "activation", f"be one of {ACTIVATIONS}", activation)
    require_shape(op, "weight1", weight1, "E", "H", "K")
    experts, hidden, depth = weight1.shape
    require_shape(op, "weight2", weight2, experts, "N", hidden)
    width = weight2.shape[1]
    require_routed_features(op, x, depth, routing)
    if bias1 is not None:
        require_shape(op, "bias1", bias1, experts, hidden)
    if bias2 is not None:
        require_shape(op, "bias2", bias2, experts, width)
    if scale is not None:
        require_shape(op, "scale", scale, experts, width)
    named = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "scale": scale}
    for name, tensor in named.items():
        if tensor is not None:
            require_parameter(op, name, tensor, x)
    if residual is not None:
        require_shape(op, "residual", residual, *x.shape[:-1], width)
        require_like(op, "residual", residual, x)
    require_routing(op, routing, x, experts)


def _pick(backend, x, weight1, weight2):
    widths = (x.shape[-1], weight1.shape[1], weight2.shape[1])
    return pick("grouped_mlp", backend, widths=widths, device=x.device, dtype=x.dtype)


def _run(x, weight1, bias1, weight2, *rest):
    *rest, backend = rest
    chosen = _pick(backend, x, weight1, weight2)
    return chosen.grouped_mlp(x, weight1, bias1, weight2, *rest)


def _fake(x, weight1, bias1, weight2, bias2, *rest):
    *_, scale, for_backward, _backend = rest
    hidden, width = weight1.shape[1], weight2.shape[1]
    keeps_pre2 = for_backward and scale is not None
    return (
        x.new_empty(*x.shape[:-1], width),
        x.new_empty((*x.shape[:-1], hidden) if for_backward else 0),
        x.new_empty((*x.shape[:-1], width) if keeps_pre2 else 0),
    )


def _setup_context(ctx, inputs, output):
    x, *layers_and_ids, ctx.activation, residual, scale, _, ctx.backend = inputs
    layers, ids = layers_and_ids[:4], layers_and_ids[4:]
    _, pre1, pre2 = output
    ctx.save_for_backward(x, *layers, pre1, pre2, *ids, scale)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(pre1, pre2)


def _backward(ctx, dy, _dpre1, _dpre2):
    *saved, scale = ctx.saved_tensors
    *needs, needs_residual, needs_scale = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 10, 11)]
    needs.append(needs_scale)
    *grads, dscale = torch.ops.mixpert.grouped_mlp_backward(
        dy, *saved, ctx.activation, scale, needs, ctx.backend
    )
    grads = [g if needed else None for g, needed in zip(grads, needs, strict=False)]
    dresidual = dy if needs_residual and ctx.has_residual else None
    return (*grads, *[None] * 5, dresidual, dscale if needs_scale else None, None, None)


def _run_backward(dy, x, weight1, bias1, weight2, *rest):
    *rest, backend = rest
    chosen = _pick(backend, x, weight1, weight2)
    return chosen.grouped_mlp_backward(dy, x, weight1, bias1, weight2, *rest)


def _fake_backward(dy, x, weight1, bias1, weight2, bias2, *rest):
    *_, scale, needs, _backend = rest
    like = (x, weight1, bias1, weight2, bias2, scale)
    return [
        t.new_empty(t.shape) if needed else x.new_empty(0)
        for t, needed in zip(like, needs, strict=True)
    ]


_LAYERS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
_ROUTING = "Tensor expert, Tensor order, Tensor offsets, Tensor? cu_seqlens"
register(
    f"grouped_mlp(Tensor x, {_LAYERS}, {_ROUTING}, str activation, Tensor? residual, Tensor? scale, "
    "bool for_backward, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
register(
    f"grouped_mlp_backward(Tensor dy, Tensor x, {_LAYERS}, Tensor pre1, Tensor pre2, {_ROUTING}, str activation, "
    "Tensor? scale, bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
register_gradient("grouped_mlp", _backward, _setup_context)
register_no_second_gradient("grouped_mlp")
