"""Defines grouped_linear: tile by tile, so that a tile's result is bitwise the same in any batch.

That holds for the activations too: PyTorch rounds the elements left over after its last full vector differently, and
which those are depends on where in memory a tile ends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, activate_backward
from .tiles import joined, own_memory, spread, tiles


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
    weight = torch.cat(weights, 1).to(x.dtype)
    bias = torch.cat(biases, 1).to(x.dtype) if biases else None
    zs = [
        F.linear(x_b, row(weight, e), None if bias is None else row(bias, e))
        for x_b, e in zip(own_memory(x, cu_seqlens), expert, strict=True)
    ]
    z = joined(zs, cu_seqlens)
    y = activate_tiles(activation, z, cu_seqlens)
    if scale is not None:
        y = y * spread(scale[expert], y, cu_seqlens).to(y.dtype)
    if residual is not None:
        y = y + residual
    return y, z if stores_pre(activation, scale, for_backward) else x.new_empty(0)


def stores_pre(activation: str, scale: Tensor | None, for_backward: bool) -> bool:
    """The pre-activation is what backward needs of the forward pass, and only for these."""
    return for_backward and (activation != "none" or scale is not None)


def activate_tiles(activation: str, z: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """act(z), tile by tile."""
    if activation == "none":
        return z
    return joined([activate(activation, tile) for tile in tiles(z, cu_seqlens)], cu_seqlens)


def row(table: Tensor, e: Tensor) -> Tensor:
    """table[e] without reading e on the host."""
    return table.index_select(0, e.reshape(1)).squeeze(0)


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
    needs_x, needs_weight, needs_bias, needs_scale = needs
    none = dy.new_empty(0)
    dscale = none
    if needs_scale:
        parts = zip(tiles(dy, cu_seqlens), tiles(pre, cu_seqlens), strict=True)
        rows = [(d * activate(activation, z)).sum(0) for d, z in parts]
        dscale = add_by_expert(torch.stack(rows), expert, scale)
    dz = dy if scale is None else dy * spread(scale[expert], dy, cu_seqlens)
    if activation != "none":
        parts = zip(tiles(dz, cu_seqlens), tiles(pre, cu_seqlens), strict=True)
        dz = joined([activate_backward(activation, d, z) for d, z in parts], cu_seqlens)
    weight = torch.cat(weights, 1) if len(weights) > 1 else weights[0]
    dx = none
    if needs_x:
        parts = zip(own_memory(dz, cu_seqlens), expert, strict=True)
        dx = joined([d @ row(weight, e) for d, e in parts], cu_seqlens)
    sizes = [w.shape[1] for w in weights]
    dweights = []
    if needs_weight:
        dweight = weight.new_zeros(weight.shape)
        batch = (own_memory(t, cu_seqlens) for t in (dz, x))
        for dz_b, x_b, e in zip(*batch, expert, strict=True):
            dweight.index_add_(0, e.reshape(1), (dz_b.T @ x_b)[None])
        dweights = [d.contiguous() for d in dweight.split(sizes, 1)]
    dbiases = []
    if needs_bias:
        rows = torch.stack([d.sum(0) for d in tiles(dz, cu_seqlens)])
        dbias = add_by_expert(rows, expert, torch.cat(biases, 1))
        dbiases = [d.contiguous() for d in dbias.split(sizes, 1)]
    return dx, dweights, dbiases, dscale


def add_by_expert(rows: Tensor, expert: Tensor, like: Tensor) -> Tensor:
    """Sum rows (B, N) into (E, N) in batch order; exact zeros for an expert without a tile."""
    return like.new_zeros(like.shape).index_add_(0, expert, rows)
