"""Backward of grouped_layer_norm: dx row by row; gradients of gain and offset in parts, added without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._reduce import sum_by_expert
from ._rows import aligned_rows, load_gain, load_rows, mean_of_rows, row_pointers
from ._tiles import Rows, locate_rows, strides


@triton.jit(
    do_not_specialize=["batch", "tokens", "stride_gb", "stride_gt", "stride_xb", "stride_xt"]
)
def _grouped_layer_norm_backward_kernel(
    dy_ptr,  # (B, T, D)
    x_ptr,  # (B, T, D)
    w_ptr,  # (E, D)
    mean_ptr,  # (B, T) float32
    rstd_ptr,  # (B, T) float32
    dx_ptr,  # (B, T, D)
    dw_ptr,  # (B, S, D) float32
    dc_ptr,  # (B, S, D) float32 or None
    expert_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    stride_gb,
    stride_gt,
    stride_xb,
    stride_xt,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    # dx[b, t, d] = rstd (u[d] - mean_d u - h[d] mean_d (u h))     u = dy w[e],  h = (x - mean) rstd,  e = expert[b]
    # dw[b, s, d] = sum_t dy h,  dc[b, s, d] = sum_t dy            over the tokens t of chunk s
    #
    # One program takes chunk s of one tile, TOKENS tokens, ROWS at a time. Grid: B * cdiv(T, TOKENS).
    # TOKENS is fixed, so that a tile's parts do not depend on the batch; another kernel adds them in batch order.
    b, begin, count, start = locate_rows(
        tl.program_id(0), batch, tokens, None, cu_seqlens_ptr, TOKENS
    )
    e = tl.load(expert_ptr + b).to(tl.int64)
    # Not rows_before: the offset of dx, computed another way, costs registers.
    apart = tokens.to(tl.int64) if cu_seqlens_ptr is None else 1
    end = tl.minimum(start + TOKENS, count)
    dw, dc = (), ()
    for _ in tl.static_range(0, D, LANES):
        dw += (tl.zeros((ROWS, LANES), tl.float32),)
        dc += (tl.zeros((ROWS, LANES), tl.float32),)
    for first in range(start, end, ROWS):
        t = first + tl.arange(0, ROWS)
        valid = (t < end)[:, None]
        row = begin.to(tl.int64) * apart + t[:, None]
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
        dy = row_pointers(dy_ptr, begin, t, stride_gb, stride_gt, VECTOR)
        dy = load_rows(dy, valid, D, LANES)
        x = row_pointers(x_ptr, begin, t, stride_xb, stride_xt, VECTOR)
        x = load_rows(x, valid, D, LANES)
        dx = row_pointers(dx_ptr, begin, t, apart * D, D, VECTOR)
        dw, dc = _add_parts(dw, dc, dy, x, mean, rstd)
        _store_dx(dy, x, mean, rstd, w_ptr, e, dx, valid, D, LANES)
    part = tl.program_id(0).to(tl.int64) * D
    for i in tl.static_range(len(dw)):
        d = i * LANES + tl.arange(0, LANES)
        tl.store(dw_ptr + part + d, tl.sum(dw[i], 0), mask=d < D)
        if dc_ptr is not None:
            tl.store(dc_ptr + part + d, tl.sum(dc[i], 0), mask=d < D)


@triton.jit
def _add_parts(dw, dc, dy, x, mean, rstd):
    new_dw, new_dc = (), ()
    for i in tl.static_range(len(dy)):
        new_dw += (tl.fma(dy[i], (x[i] - mean) * rstd, dw[i]),)
        new_dc += (dc[i] + dy[i],)
    return new_dw, new_dc


@triton.jit
def _store_dx(dy, x, mean, rstd, w_ptr, e, dx, valid, D: tl.constexpr, LANES: tl.constexpr):
    sum_u = tl.zeros(dy[0].shape, tl.float32)
    sum_uh = tl.zeros(dy[0].shape, tl.float32)
    for i in tl.static_range(len(dy)):
        u = dy[i] * load_gain(w_ptr, e, i, dx, D, LANES)
        sum_u += u
        sum_uh = tl.fma(u, (x[i] - mean) * rstd, sum_uh)
    mean_u = mean_of_rows(sum_u, D)
    mean_uh = mean_of_rows(sum_uh, D)
    for i in tl.static_range(len(dy)):
        d = i * LANES + tl.arange(0, LANES)[None, :]
        inside = valid if (i + 1) * LANES <= D else valid & (d < D)
        u = dy[i] * load_gain(w_ptr, e, i, dx, D, LANES)
        away = tl.fma((x[i] - mean) * rstd, -mean_uh, u - mean_u)
        tl.store(dx + d, (away * rstd).to(dx.dtype.element_ty), mask=inside)


def grouped_layer_norm_backward(
    dy: Tensor,  # (B, T, D), packed (R, D); x, mean, rstd and dx likewise
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    mean: Tensor,  # (B, T, 1) float32
    rstd: Tensor,  # (B, T, 1) float32
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    cu_seqlens: Tensor | None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), (E, D), (E, D) or empty
    rows, width = Rows.of(x, cu_seqlens), x.shape[-1]
    block = _configs.layer_norm(width, x.element_size(), backward=True)
    dy, x, weight = (aligned_rows(t) for t in (dy, x, weight))
    chunk = _configs.LAYER_NORM_TOKENS
    dx = x.new_empty(x.shape)
    dw = x.new_empty(*rows.blocks(chunk), width, dtype=torch.float32)
    dc = None if bias is None else torch.empty_like(dw)
    args = {
        "dy_ptr": dy,
        "x_ptr": x,
        "w_ptr": weight,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "dw_ptr": dw,
        "dc_ptr": dc,
        "expert_ptr": expert,
        **rows.args,
        **strides("stride_g{}", dy),
        **strides("stride_x{}", x),
        "D": width,
        "VECTOR": block.VECTOR,
        "ROWS": block.ROWS,
        "LANES": block.LANES,
        "TOKENS": chunk,
    }
    grid = (rows.num_blocks(chunk),)
    _launch.launch(_grouped_layer_norm_backward_kernel, grid, args, block)
    ids, packed = (order, offsets, weight.shape[0]), {"cu_seqlens": cu_seqlens, "chunk": chunk}
    dweight = sum_by_expert(dw, *ids, weight.dtype, **packed)
    if dc is None:
        return dx, dweight, weight.new_empty(0)
    return dx, dweight, sum_by_expert(dc, *ids, weight.dtype, **packed)
