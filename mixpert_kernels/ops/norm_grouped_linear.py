"""norm_grouped_linear: each tile through the LayerNorm and then the linear layer of its expert, in one call."""

from __future__ import annotations

from collections.abc import Sequence

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
from ._library import register
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import check_weights, grouped_linear


def norm_grouped_linear(
    x: Tensor,  # (B, T, K) or (R, K)
    norm_weight: Tensor,  # (E, K)
    norm_bias: Tensor | None,  # (E, K)
    weight: Tensor | Sequence[Tensor],  # (E, N, K)
    bias: Tensor | Sequence[Tensor] | None,  # (E, N)
    routing: Routing,
    *,
    norm_eps: float = 1e-5,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:  # (B, T, N) or (R, N)
    """Apply to each tile the LayerNorm and the linear layer of its expert.

    ``h = grouped_layer_norm(x, routing)``, ``y = grouped_linear(h, routing)`` by one backend, bit for bit: both halves
    of a pre-LN block begin so, and for few tiles one launch can do both.

    It is for inference. When a gradient is needed, and under autocast, the two ops run one after the other: they have
    gradients and dtypes of their own.

    Args:
        x: (B, T, K), B tiles of T tokens, or packed rows (R, K) where ``routing.cu_seqlens`` is given; float16,
            bfloat16, float32 or float64.
        norm_weight: (E, K), device and dtype of ``x``; beside float32 features also half precision, as all that follow.
        norm_bias: (E, K) or None.
        weight: (E, N, K), or a sequence of weights (E, N_i, K) whose outputs lie side by side, N = sum N_i.
        bias: (E, N), a sequence to match ``weight``, or None.
        routing: which expert serves each tile.
        norm_eps: added to the variance; at least 0.
        activation: ``none``, ``gelu`` (erf), ``gelu_tanh``, ``quick_gelu`` (z * sigmoid(1.702 z)) or ``relu``.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, T, N), or (R, N) for packed rows, in the dtype of ``x`` (of autocast, under autocast); the normalised
        features are rounded to the dtype of ``x``, sums accumulated in float32 or better.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or name.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output and the normalised features. At most two launches on a GPU, always two for packed rows.
        Never waits for the device.

    Example:
        >>> x = torch.tensor([[[3.0, 1.0]], [[3.0, 1.0]]])
        >>> gain, weight = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]])
        >>> routing = Routing.forced(torch.tensor([1, 0]), 2)
        >>> norm_grouped_linear(x, gain, None, weight, None, routing, norm_eps=0.0).flatten()
        tensor([-10.,   1.])

    Source: docs/math.md, norm_grouped_linear.
    """
    weights = [weight] if weight is None or isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    require_floating("norm_grouped_linear", "x", x)
    separate = autocast_dtype(x) is not None
    if not separate:
        _check(x, norm_weight, norm_bias, norm_eps, weights, biases, activation, routing)
        tensors = [x, norm_weight, norm_bias, *weights, *biases]
        separate = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
    if separate:
        h = grouped_layer_norm(x, norm_weight, norm_bias, routing, eps=norm_eps, backend=backend)
        return grouped_linear(h, weights, biases, routing, activation=activation, backend=backend)
    return torch.ops.mixpert.norm_grouped_linear(
        x,
        norm_weight.to(x.dtype),
        None if norm_bias is None else norm_bias.to(x.dtype),
        norm_eps,
        weights,
        biases,
        *routing.ids,
        activation,
        backend,
    )


def _check(x, gain, offset, eps, weights, biases, activation, routing) -> None:
    op = "norm_grouped_linear"
    experts, _ = check_weights(op, weights, biases, activation, x)
    require_routed_features(op, x, weights[0].shape[2], routing)
    check_norm(op, x, gain, offset, eps, experts)
    require_routing(op, routing, x, experts)


def check_norm(op, x, gain, offset, eps, experts) -> None:
    """Check the LayerNorm before a linear layer of that many experts."""
    require_shape(op, "norm_weight", gain, experts, x.shape[-1])
    require_parameter(op, "norm_weight", gain, x)
    if offset is not None:
        require_shape(op, "norm_bias", offset, experts, x.shape[-1])
        require_parameter(op, "norm_bias", offset, x)
    require(eps >= 0, op, "norm_eps", "be at least 0", eps)


def _run(x, norm_weight, norm_bias, norm_eps, weights, *rest):
    *rest, backend = rest
    widths = (x.shape[-1], sum(w.shape[1] for w in weights))
    chosen = pick("norm_grouped_linear", backend, widths=widths, device=x.device, dtype=x.dtype)
    return chosen.norm_grouped_linear(x, norm_weight, norm_bias, norm_eps, weights, *rest)


def _fake(x, norm_weight, norm_bias, norm_eps, weights, *rest):
    return x.new_empty(*x.shape[:-1], sum(w.shape[1] for w in weights))


register(
    "norm_grouped_linear(Tensor x, Tensor norm_weight, Tensor? norm_bias, float norm_eps, Tensor[] weights, "
    "Tensor[] biases, Tensor expert, Tensor order, Tensor offsets, Tensor? cu_seqlens, str activation, "
    "str backend) -> Tensor",
    _run,
    _fake,
)
