"""grouped_layer_norm: a program normalises a few tokens of one tile with the gain and offset of its expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._grouped_layer_norm_backward import (
    grouped_layer_norm_backward as grouped_layer_norm_backward,
)
from ._rows import aligned_rows, normalise_rows, row_pointers
from ._tiles import Rows, locate_rows, rows_before, strides


@triton.jit(do_not_specialize=["batch", "tokens", "stride_xb", "stride_xt"])
def _grouped_layer_norm_kernel(
    x_ptr,  # (B, T, D)
    w_ptr,  # (E, D)
    c_ptr,  # (E, D) or None
    y_ptr,  # (B, T, D)
    mean_ptr,  # (B, T) float32
    rstd_ptr,  # (B, T) float32
    expert_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    stride_xb,
    stride_xt,
    eps,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    # y[b, t, d] = (x[b, t, d] - mean[b, t]) rstd[b, t] w[e, d] + c[e, d]     with e = expert[b]
    # mean[b, t] = sum_d x[b, t, d] / D,  rstd[b, t] = (sum_d (x[b, t, d] - mean[b, t])^2 / D + eps)^-1/2
    #
    # One program normalises ROWS tokens of one tile. Grid: B * cdiv(T, ROWS).
    # Strides and T are not specialised: where a tile lies in memory must not change the order of its sums.
    b, begin, count, first = locate_rows(
        tl.program_id(0), batch, tokens, None, cu_seqlens_ptr, ROWS
    )
    t = first + tl.arange(0, ROWS)
    e = tl.load(expert_ptr + b).to(tl.int64)
    valid = (t < count)[:, None]
    before = rows_before(begin, tokens, cu_seqlens_ptr)
    x = row_pointers(x_ptr, begin, t, stride_xb, stride_xt, VECTOR)
    y = row_pointers(y_ptr, before, t, D, D, VECTOR)
    mean, rstd = normalise_rows(x, y, w_ptr, c_ptr, e, valid, eps, D, LANES)
    row = before + t[:, None]
    tl.store(mean_ptr + row, mean, mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=valid)


def grouped_layer_norm(
    x: Tensor,  # (B, T, D), packed (R, D); the results likewise
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), mean (B, T, 1) float32, rstd (B, T, 1) float32
    rows, width = Rows.of(x, cu_seqlens), x.shape[-1]
    block = _configs.layer_norm(width, x.element_size())
    x, weight, bias = (aligned_rows(t) for t in (x, weight, bias))
    y = x.new_empty(x.shape)
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    args = {
        "x_ptr": x,
        "w_ptr": weight,
        "c_ptr": bias,
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "expert_ptr": expert,
        **rows.args,
        **strides("stride_x{}", x),
        "eps": eps,
        "D": width,
        "VECTOR": block.VECTOR,
        "ROWS": block.ROWS,
        "LANES": block.LANES,
    }
    grid = (rows.num_blocks(block.ROWS),)
    _launch.launch(_grouped_layer_norm_kernel, grid, args, block)
    return y, mean, rstd
