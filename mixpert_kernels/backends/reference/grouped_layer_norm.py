"""Defines grouped_layer_norm: tile by tile, so that a tile's result is bitwise the same in any batch."""

import torch
from torch import Tensor

from .grouped_linear import add_by_expert, row


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
    tiles = [
        torch.native_layer_norm(
            x_b, x.shape[-1:], row(weight, e), None if bias is None else row(bias, e), eps
        )
        for x_b, e in zip(x, expert, strict=True)
    ]
    y, mean, rstd = (torch.stack(parts) for parts in zip(*tiles, strict=True))
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
    tiles = [
        torch.ops.aten.native_layer_norm_backward(
            dy[b],
            x[b],
            x.shape[-1:],
            mean[b],
            rstd[b],
            row(weight, expert[b]),
            None if bias is None else row(bias, expert[b]),
            [True, True, bias is not None],
        )
        for b in range(x.shape[0])
    ]
    dx, dweight_b, dbias_b = zip(*tiles, strict=True)
    dweight = add_by_expert(torch.stack(dweight_b), expert, weight)
    if bias is None:
        return torch.stack(dx), dweight, weight.new_empty(0)
    return torch.stack(dx), dweight, add_by_expert(torch.stack(dbias_b), expert, bias)
