"""grouped_linear on a CPU: a fused oneDNN linear for each run of tiles that share an expert.

A CPU has no launch to save, so what counts is large products, no copies and no separate pass over memory for bias,
activation or residual. Tiles are visited in batch order: a caller that sorts its tiles by expert gets one product an
expert.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpert_kernels.backends.reference.activations import activate
from mixpert_kernels.backends.reference.grouped_linear import (
    grouped_linear_backward as grouped_linear_backward,
)
from mixpert_kernels.backends.reference.grouped_linear import stores_pre

from .native import compute_dtype
from .packing import packed
from .runs import join, runs

# Named overloads: finding the one that fits costs milliseconds, since a misfit prints its tensors into an error.
_linear = torch.ops.mkldnn._linear_pointwise

# (attribute, algorithm) of mkldnn::_linear_pointwise. quick_gelu has none: oneDNN's swish there takes no slope.
FUSED = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


def grouped_linear(
    x: Tensor,  # (B, T, K)
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, N), pre-activation (B, T, N) or empty
    keep = stores_pre(activation, scale, for_backward)
    ys, pres = [], []
    for e, first, last in runs(expert):
        args = (x[first:last], weights, biases, scale, e)
        add = None if residual is None else residual[first:last]
        if for_backward:
            y, pre = _plain(*args, activation, add)
        else:
            y, pre = _fused(*args, activation, add), None
        ys.append(y)
        pres.append(pre)
    return join(ys), join(pres) if keep else x.new_empty(0)


def _plain(x, weights, biases, scale, e, activation, residual) -> tuple[Tensor, Tensor]:
    """The training path: nothing is reordered or folded, since the weights change every step."""
    zs = [
        F.linear(x, w[e].to(x.dtype), b[e].to(x.dtype) if b is not None else None)
        for w, b in itertools.zip_longest(weights, biases)
    ]
    z = torch.cat(zs, -1) if len(zs) > 1 else zs[0]
    y = activate(activation, z)
    if scale is not None:
        y = y * scale[e].to(y.dtype)
    return (y if residual is None else y + residual), z


def _fused(x, weights, biases, scale, e, activation, residual) -> Tensor:
    dtype = compute_dtype(x.dtype)
    foldable = scale if activation == "none" else None
    layer = packed(weights, biases, foldable, e, dtype)
    if layer is None:
        return _plain(x, weights, biases, scale, e, activation, residual)[0]
    rows = x.to(dtype)
    if residual is not None and activation == "none":
        added = residual.to(dtype).contiguous()
        y = _linear.binary(rows, added, layer.weight, layer.bias, "add")
        return y.to(x.dtype)
    attribute, algorithm = FUSED.get(activation, FUSED["none"])
    y = _linear.default(rows, layer.weight, layer.bias, attribute, [], algorithm)
    if activation not in FUSED:
        y = activate(activation, y)
    if scale is not None and foldable is None:
        y = y * scale[e].to(y.dtype)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)
