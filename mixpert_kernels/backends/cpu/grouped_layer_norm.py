"""grouped_layer_norm on a CPU: one call for each run of tiles that share an expert."""

import torch
from torch import Tensor

from .runs import join, runs


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
            x[first:last], x.shape[-1:], weight[e], None if bias is None else bias[e], eps
        )
        for e, first, last in runs(expert, cu_seqlens)
    ]
    y, mean, rstd = (join(list(found)) for found in zip(*parts, strict=True))
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
    dweight = torch.zeros_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.zeros_like(bias)
    dxs = []
    for e, first, last in runs(expert, cu_seqlens):
        part = slice(first, last)
        dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
            *(dy[part], x[part], x.shape[-1:], mean[part], rstd[part], weight[e]),
            None if bias is None else bias[e],
            [True, True, bias is not None],
        )
        dxs.append(dx)
        dweight[e] += dgain
        if bias is not None:
            dbias[e] += dshift
    return join(dxs), dweight, dbias
