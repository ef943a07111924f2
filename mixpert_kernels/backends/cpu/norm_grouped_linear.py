"""norm_grouped_linear on a CPU: both ops for each run of tiles that share an expert, one run after the other."""

import torch
from torch import Tensor

from .grouped_linear import fused
from .runs import join, runs


def norm_grouped_linear(
    x: Tensor,  # (B, T, K)
    norm_weight: Tensor,  # (E, K)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
) -> Tensor:  # (B, T, N)
    ys = []
    for e, first, last in runs(expert, cu_seqlens):
        bias = None if norm_bias is None else norm_bias[e]
        rows = torch.native_layer_norm(x[first:last], x.shape[-1:], norm_weight[e], bias, norm_eps)[
            0
        ]
        ys.append(fused(rows, weights, biases, None, e, activation, None))
    return join(ys)
