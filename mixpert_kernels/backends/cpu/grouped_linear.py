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

from mixpert_kernels.backends.reference.activations import activate, activate_backward
from mixpert_kernels.backends.reference.grouped_linear import stores_pre
from mixpert_kernels.backends.reference.tiles import spread

from .native import compute_dtype
from .packing import packed
from .runs import join, runs

# Named overloads: finding the one that fits costs milliseconds, since a misfit prints its tensors into an error.
_linear = torch.ops.mkldnn._linear_pointwise

# (attribute, algorithm) of mkldnn::_linear_pointwise. quick_gelu has none: its swish, z * sigmoid(z), takes no slope.
FUSED = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "swish": ("swish", ""),
}


def grouped_linear(
    x: Tensor,  # (B, T, K)
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, N), pre-activation (B, T, N) or empty
    keep = stores_pre(activation, scale, for_backward)
    ys, pres = [], []
    for e, first, last in runs(expert, cu_seqlens):
        args = (x[first:last], weights, biases, scale, e)
        add = None if residual is None else residual[first:last]
        if for_backward:
            y, pre = _plain(*args, activation, add)
        else:
            y, pre = fused(*args, activation, add), None
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


def fused(x, weights, biases, scale, e, activation, residual, factors=(1.0, 1.0)) -> Tensor:
    """One run of tiles x through expert ``e`` in inference; ``factors``: of the weights and of the biases."""
    dtype = compute_dtype(x.dtype)
    foldable = scale if activation == "none" else None
    layer = packed(weights, biases, foldable, e, dtype, factors)
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


def grouped_linear_backward(
    dy: Tensor,  # (B, T, N)
    x: Tensor,  # (B, T, K)
    weights: list[Tensor],
    biases: list[Tensor],
    pre: Tensor,  # (B, T, N) or empty
    expert: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    scale: Tensor | None,
    needs: list[bool],  # of x, weights, biases, scale
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Two products for each run and weight, each added where it belongs: no sum passes over memory a second time."""
    needs_x, needs_weight, needs_bias, needs_scale = needs
    none = dy.new_empty(0)
    dscale = torch.zeros_like(scale) if needs_scale else none
    if needs_scale:
        _add_sums(dscale, dy * activate(activation, pre), expert, cu_seqlens)
    dz = dy if scale is None else dy * spread(scale[expert], dy, cu_seqlens).to(dy.dtype)
    dz = activate_backward(activation, dz, pre)
    parts = dz.split([w.shape[1] for w in weights], -1)
    dx = x.new_empty(x.shape) if needs_x else none  # in rows, whatever x is; every tile is in a run
    dweights = [torch.zeros_like(w) for w in weights] if needs_weight else []
    dbiases = [torch.zeros_like(b) for b in biases] if needs_bias else []
    for e, first, last in runs(expert, cu_seqlens):
        rows = x[first:last].flatten(0, -2)
        for i, part in enumerate(parts):
            d = part[first:last].flatten(0, -2)  # (R, N_i)
            if needs_x:
                dx[first:last].view(rows.shape).addmm_(d, weights[i][e], beta=min(i, 1))
            if needs_weight:
                dweights[i][e].addmm_(d.T, rows)
    for dbias, part in zip(dbiases, parts, strict=False):
        _add_sums(dbias, part, expert, cu_seqlens)
    return dx, dweights, dbiases, dscale


def _add_sums(table: Tensor, rows: Tensor, expert: Tensor, cu_seqlens: Tensor | None) -> None:
    """Add to table (E, N) the rows (B, T, N) or (R, N) of each expert's tiles."""
    for e, first, last in runs(expert, cu_seqlens):
        table[e] += rows[first:last].sum((0, 1)[: rows.ndim - 1])
