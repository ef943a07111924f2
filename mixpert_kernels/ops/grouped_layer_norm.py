"""grouped_layer_norm: each tile through the LayerNorm of its expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.routing import Routing

from ._checks import (
    autocast_dtype,
    require,
    require_floating,
    require_parameter,
    require_routed_features,
    require_routing,
    require_shape,
)
from ._library import register, register_gradient, register_no_second_gradient


def grouped_layer_norm(
    x: Tensor,  # (B, T, D) or (R, D)
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    routing: Routing,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # as x
    """Normalise each token over D, with the gain and offset of its tile's expert.

    ``y[b, t] = (x[b, t] - mean) / sqrt(var + eps) * weight[e] + bias[e]`` with ``e = routing.expert[b]`` and the
    biased variance.

    Args:
        x: (B, T, D) floating point, or packed rows (R, D) where ``routing.cu_seqlens`` is given.
        weight: (E, D), device and dtype of ``x``; beside float32 features also half precision.
        bias: (E, D) or None.
        routing: which expert serves each tile.
        eps: added to the variance; at least 0.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        The shape of ``x``, in its dtype (float32 under autocast); statistics in float32 or better.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or eps is negative.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output and two numbers a token. Never waits for the device.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]])
        >>> gain = torch.tensor([[1.0, 1.0], [10.0, 10.0]])
        >>> grouped_layer_norm(x, gain, None, Routing.forced(torch.tensor([1, 0]), 2), eps=0.0).flatten()
        tensor([-10.,  10.,  -1.,   1.])
    """
    op = "grouped_layer_norm"
    require_floating(op, "x", x)
    if autocast_dtype(x) is not None:
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    require_shape(op, "weight", weight, "E", "D")
    require_routed_features(op, x, weight.shape[1], routing)
    require_parameter(op, "weight", weight, x)
    if bias is not None:
        require_shape(op, "bias", bias, *weight.shape)
        require_parameter(op, "bias", bias, x)
    require(eps >= 0, op, "eps", "be at least 0", eps)
    require_routing(op, routing, x, weight.shape[0])
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y, _, _ = torch.ops.mixpert.grouped_layer_norm(x, weight, bias, *routing.ids, eps, backend)
    return y


def _pick(backend, x):
    return pick("grouped_layer_norm", backend, widths=x.shape[-1:], device=x.device, dtype=x.dtype)


def _run(x, weight, bias, expert, order, offsets, cu_seqlens, eps, backend):
    chosen = _pick(backend, x)
    return chosen.grouped_layer_norm(x, weight, bias, expert, order, offsets, cu_seqlens, eps)


def _fake(x, weight, bias, expert, order, offsets, cu_seqlens, eps, backend):
    statistic = x.new_empty(*x.shape[:-1], 1, dtype=_statistics_dtype(x, backend))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _statistics_dtype(x, backend):
    """PyTorch keeps half-precision rows' statistics in their own dtype on a CPU; on a GPU, and in Triton, float32."""
    if x.device.type != "cpu" and x.dtype != torch.float64:
        return torch.float32
    place = {"device": x.device, "dtype": x.dtype}
    chosen = pick("grouped_layer_norm", backend, **place)  # widths may be symbols
    return torch.float32 if ".triton." in chosen.__name__ else x.dtype


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ids, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, *ids)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy, _dmean, _drstd):
    saved = ctx.saved_tensors  # once: gradient checkpointing unpacks them a single time
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = torch.ops.mixpert.grouped_layer_norm_backward(dy, *saved, ctx.backend)
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        *[None] * 6,
    )


def _run_backward(dy, x, weight, bias, mean, rstd, expert, order, offsets, cu_seqlens, backend):
    ids = (expert, order, offsets, cu_seqlens)
    return _pick(backend, x).grouped_layer_norm_backward(dy, x, weight, bias, mean, rstd, *ids)


def _fake_backward(dy, x, weight, bias, *_):
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


register(
    "grouped_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor expert, Tensor order, Tensor offsets, "
    "Tensor? cu_seqlens, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
register(
    "grouped_layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "Tensor expert, Tensor order, Tensor offsets, Tensor? cu_seqlens, str backend) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
register_gradient("grouped_layer_norm", _backward, _setup_context)
register_no_second_gradient("grouped_layer_norm")
