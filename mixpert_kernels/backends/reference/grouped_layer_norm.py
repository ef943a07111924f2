"""Defines grouped_layer_norm: tile by tile, so that a tile's result is bitwise the same in any batch."""

import torch
from torch import Tensor

from .grouped_linear import add_by_expert, row
from .tiles import joined, tiles


def grouped_layer_norm(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), mean (B, T, 1), rstd (B, T, 1)
    parts = [
        torch.native_layer_norm(
            x_b, x.shape[-1:], row(weight, e), None if bias is None else row(bias, e), eps
        )
        for x_b, e in zip(tiles(x, cu_seqlens), expert, strict=True)
    ]
    y, mean, rstd = (joined(found, cu_seqlens) for found in zip(*parts, strict=True))
    return y, mean, rstd


def grouped_layer_norm_backward(
    dy: Tensor,  # (B, T, D)
    x: Tensor,  # (B, T, D)
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    expert: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), (E, D), (E, D) or empty
    batch = (tiles(t, cu_seqlens) for t in (dy, x, mean, rstd))
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            dy_b,
            x_b,
            x.shape[-1:],
            mean_b,
            rstd_b,
            row(weight, e),
            None if bias is None else row(bias, e),
            [True, True, bias is not None],
        )
        for dy_b, x_b, mean_b, rstd_b, e in zip(*batch, expert, strict=True)
    ]
    dx_b, dweight_b, dbias_b = zip(*parts, strict=True)
    dx = joined(dx_b, cu_seqlens)
    dweight = add_by_expert(torch.stack(dweight_b), expert, weight)
    if bias is None:
        return dx, dweight, weight.new_empty(0)
    return dx, dweight, add_by_expert(torch.stack(dbias_b), expert, bias)
