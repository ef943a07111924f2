"""grouped_adapter on a CPU: the products of each run of tiles that share an expert, written into place."""

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.grouped_adapter import grouped_adapter_backward

from .runs import runs

__all__ = ["grouped_adapter", "grouped_adapter_backward"]


def grouped_adapter(
    x: Tensor,  # (B, T, D)
    down: Tensor,  # (E, H, D)
    down_bias: Tensor,  # (E, H)
    up: Tensor,  # (E, D, H)
    up_bias: Tensor,  # (E, D)
    scale: Tensor,  # (E,)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    residual: Tensor | None,  # (B, T, D)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, D), hidden (B, T, H) or empty
    down, down_bias, up, up_bias, scale = (
        p.to(x.dtype) for p in (down, down_bias, up, up_bias, scale)
    )
    hidden = x.new_empty(*x.shape[:-1], down.shape[1])
    y = x.new_empty(x.shape)
    for e, first, last in runs(expert, cu_seqlens):
        part = slice(first, last)
        h, o = (t[part].flatten(0, -2) for t in (hidden, y))
        torch.addmm(down_bias[e], x[part].flatten(0, -2), down[e].T, out=h).relu_()
        torch.addmm(up_bias[e], h, up[e].T, out=o).mul_(scale[e])
    if residual is not None:
        zero = y == 0
        y += residual
        if zero.any():  # -0 + 0 is 0
            y = torch.where(zero, residual, y)
    return y, hidden if for_backward else x.new_empty(0)
