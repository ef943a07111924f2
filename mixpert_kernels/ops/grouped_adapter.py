"""grouped_adapter: each tile through the bottleneck adapter of its expert, beside a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
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
    tiles_of,
)
from ._library import register, register_gradient, register_no_second_gradient

MAX_HIDDEN = 128  # so that a block's hidden numbers stay in the registers that computed them


def grouped_adapter(
    x: Tensor,  # (B, T, D) or (R, D)
    down: Tensor,  # (E, H, D)
    down_bias: Tensor,  # (E, H)
    up: Tensor,  # (E, D, H)
    up_bias: Tensor,  # (E, D)
    scale: Tensor,  # (E,)
    routing: Routing,
    *,
    residual: Tensor | None = None,  # as x
    probabilities: Tensor | None = None,  # (B, E)
    backend: str = "auto",
) -> Tensor:  # as x
    """Apply to each tile the adapter of its expert, and no other.

    ``y[b] = scale[e] * (relu(x[b] @ down[e].T + down_bias[e]) @ up[e].T + up_bias[e]) + residual[b]`` with
    ``e = routing.expert[b]``. An adapter's output that is zero leaves the residual as it is, bit for bit.

    ``probabilities`` are those of the router that chose. The choice is hard, so their value is not in the result, but
    they get the straight-through gradient of ``G = onehot(e) - stopgrad(p) + p`` in ``sum_k G[b, k] Adapter_k(x[b])``:
    ``<dy[b], Adapter_k(x[b])>`` for every k. No adapter but the chosen one is computed for it, in forward or backward,
    further than its H hidden numbers. All other gradients are the chosen adapter's, for the others' G is 0.

    Args:
        x: (B, T, D), B tiles (samples) of T tokens, or packed rows (R, D) where ``routing.cu_seqlens`` is given;
            float16, bfloat16, float32 or float64.
        down: (E, H, D), H at most 128; device and dtype of ``x``; beside float32 features also half precision, as all
            parameters.
        down_bias: (E, H).
        up: (E, D, H).
        up_bias: (E, D).
        scale: (E,), a factor an adapter.
        routing: which adapter serves each tile.
        residual: of the result's shape, added last.
        probabilities: (B, E), floating point. Without a gradient to give them, they are not used.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, T, D), or (R, D) for packed rows, in the dtype of ``x`` (of autocast, under autocast); products accumulate
        in float32 or better.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: no backend can run the call, or a gradient of a gradient is asked for.

    Cost:
        Memory: the output; when a gradient will be needed also the H hidden numbers of each token. One launch, 1/E of
        the products of all adapters. Backward for ``probabilities``: two products of E * H columns. Never waits for
        the device.

    Example:
        >>> x, down = torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[-1.0]]])
        >>> down_bias, up, up_bias = torch.zeros(2, 1), torch.full((2, 1, 1), 3.0), torch.ones(2, 1)
        >>> routing = Routing.forced(torch.tensor([1, 0]), 2)
        >>> grouped_adapter(x, down, down_bias, up, up_bias, torch.tensor([1.0, 2.0]), routing).flatten()
        tensor([2., 4.])

    Source: docs/math.md, grouped_adapter; MoME, arXiv 2407.12709.
    """
    require_floating("grouped_adapter", "x", x)
    params = (down, down_bias, up, up_bias, scale)
    if (dtype := autocast_dtype(x)) is not None:
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
        params = tuple(p.to(dtype) for p in params)
    _check(x, *params, routing, residual, probabilities)
    if probabilities is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        needed = torch.is_grad_enabled() and probabilities.requires_grad
        probabilities = probabilities.to(wide) if needed else None
    differentiable = (x, *params, residual, probabilities)
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    if for_backward:  # so that gradients come back in each parameter's own dtype
        params = tuple(p.to(x.dtype) for p in params)
    y, _ = torch.ops.mixpert.grouped_adapter(
        x, *params, *routing.ids, residual, probabilities, for_backward, backend
    )
    return y


def _check(x, down, down_bias, up, up_bias, scale, routing, residual, probabilities) -> None:
    op = "grouped_adapter"
    require_shape(op, "down", down, "E", "H", "D")
    experts, hidden, width = down.shape
    require(hidden <= MAX_HIDDEN, op, "down", f"have at most {MAX_HIDDEN} hidden numbers", hidden)
    require_shape(op, "down_bias", down_bias, experts, hidden)
    require_shape(op, "up", up, experts, width, hidden)
    require_shape(op, "up_bias", up_bias, experts, width)
    require_shape(op, "scale", scale, experts)
    require_routed_features(op, x, width, routing)
    named = {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias, "scale": scale}
    for name, tensor in named.items():
        require_parameter(op, name, tensor, x)
    if residual is not None:
        require_shape(op, "residual", residual, *x.shape)
        require_like(op, "residual", residual, x)
    require_routing(op, routing, x, experts)
    if probabilities is not None:
        tiles = tiles_of(x, routing.cu_seqlens)
        require_shape(op, "probabilities", probabilities, tiles, experts)
        require_floating(op, "probabilities", probabilities)
        where = f"be on the device of x, {x.device}"
        require(probabilities.device == x.device, op, "probabilities", where, probabilities.device)


def _pick(backend, x, down):
    widths = (x.shape[-1], down.shape[1])
    return pick("grouped_adapter", backend, widths=widths, device=x.device, dtype=x.dtype)


def _run(x, down, *rest):
    *rest, _probabilities, for_backward, backend = rest
    return _pick(backend, x, down).grouped_adapter(x, down, *rest, for_backward)


def _fake(x, down, *rest):
    for_backward = rest[-2]
    hidden = (*x.shape[:-1], down.shape[1]) if for_backward else 0
    return x.new_empty(x.shape), x.new_empty(hidden)


def _setup_context(ctx, inputs, output):
    x, *params_and_ids, residual, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, *params_and_ids[:5], output[1], *params_and_ids[5:])
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _dhidden):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 5, 11)]
    needs_residual = ctx.needs_input_grad[10]
    grads = torch.ops.mixpert.grouped_adapter_backward(dy, *ctx.saved_tensors, needs, ctx.backend)
    *grads, dprobabilities = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    dresidual = dy if needs_residual and ctx.has_residual else None
    return (*grads, *[None] * 4, dresidual, dprobabilities, None, None)


def _run_backward(dy, x, down, *rest):
    *rest, backend = rest
    return _pick(backend, x, down).grouped_adapter_backward(dy, x, down, *rest)


def _fake_backward(dy, x, down, down_bias, up, up_bias, scale, hidden, expert, *rest):
    *_, needs, _backend = rest
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grads = [t.new_empty(t.shape) for t in (x, down, down_bias, up, up_bias, scale)]
    grads.append(x.new_empty(expert.shape[0], down.shape[0], dtype=wide))
    return [g if needed else x.new_empty(0) for g, needed in zip(grads, needs, strict=True)]


_PARAMS = "Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor scale"
_ROUTING = "Tensor expert, Tensor order, Tensor offsets, Tensor? cu_seqlens"
register(
    f"grouped_adapter(Tensor x, {_PARAMS}, {_ROUTING}, Tensor? residual, Tensor? probabilities, "
    "bool for_backward, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
register(
    f"grouped_adapter_backward(Tensor dy, Tensor x, {_PARAMS}, Tensor hidden, {_ROUTING}, bool[] needs, str backend) "
    "-> Tensor[]",
    _run_backward,
    _fake_backward,
)
register_gradient("grouped_adapter", _backward, _setup_context)
register_no_second_gradient("grouped_adapter")
