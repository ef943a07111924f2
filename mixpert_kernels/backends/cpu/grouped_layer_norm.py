"""grouped_layer_norm on a CPU: one call for each run of tiles that share an expert."""

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.grouped_layer_norm import (
    grouped_layer_norm_backward as grouped_layer_norm_backward,
)

from .runs import join, runs


def grouped_layer_norm(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), mean (B, T, 1), rstd (B, T, 1)
    parts = [
        torch.native_layer_norm(
            x[first:last], x.shape[-1:], weight[e], None if bias is None else bias[e], eps
        )
        for e, first, last in runs(expert)
    ]
    y, mean, rstd = (join(list(found)) for found in zip(*parts, strict=True))
    return y, mean, rstd
