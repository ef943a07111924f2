"""The gradient of grouped_linear with respect to its features, one launch for all weights of the call."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from . import _configs, _launch
from ._operands import Rows, aligned_pieces, alike, cdiv, named, padded, strides


def linear_dx(
    dz: Tensor,  # (B, T, sum N_i) or (R, sum N_i)
    weights: list[Tensor],  # each (E, N_i, K)
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    activation: str = "none",
    pre: Tensor | None = None,  # as dx
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor | None]:  # dx (B, T, K) or (R, K), h as dx
    """Return ``dx = (sum_i dz_i @ weights[i][e]) * act'(pre)`` and ``h = act(pre)``; without ``pre``, dz @ W and None.

    One launch for up to three weights of one shape and layout; others are concatenated first.
    """
    rows, columns = Rows.of(dz, cu_seqlens), weights[0].shape[2]

    def blocks(facts: dict[str, int]) -> int:
        return rows.blocks(facts["block_m"]) * cdiv(columns, facts["block_n"])

    name = f"grouped_linear_backward_{_configs.SUFFIX[dz.dtype]}"
    kernel = _configs.of_size(name, dz.device, blocks)
    facts = _launch.kernels()[kernel].constants
    weights = [padded(w.to(dz.dtype)) for w in weights]
    # A tile of dz must not reach into the columns of the next weight.
    apart = len(weights) == 1 or weights[0].shape[1] % facts["block_k"] == 0
    if alike(weights) < len(weights) or not apart:
        weights = [torch.cat(weights, 1)]
    dz = padded(dz)
    dx = dz.new_empty(*dz.shape[:-1], columns)
    pre = None if pre is None else pre.contiguous()
    h = None if pre is None else torch.empty_like(dx)
    args = {
        "dz": dz,
        **named("w{}", weights),
        "pre": pre,
        "dx": dx,
        "h": h,
        "expert": expert,
        "order": order,
        **rows.arguments(),
        "columns": columns,
        "depth": weights[0].shape[1],
        "weights": len(weights),
        "activation": ACTIVATIONS.index(activation),
        "aligned": aligned_pieces(columns, dx, pre, h),
        **strides("stride_z{}", dz, "bt"),
        **strides("stride_w{}", weights[0], "en"),
    }
    _launch.launch(kernel, blocks(facts), args)
    return dx, h
