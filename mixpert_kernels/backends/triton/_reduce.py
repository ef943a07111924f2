"""The elementwise part of a grouped layer's backward, dz = dy * scale * act'(pre), and sums over an expert's tokens.

Sums are made in two steps, without atomics: chunks of a tile's tokens first, then the chunks of each expert's tiles in
order. A chunk's size is a constant, so an expert's sums are bit for bit what its own tiles alone give.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._gemm import WEIGHTS, rows_dense
from ._math import activate, activate_grad
from ._tiles import Rows, first_block, locate_rows, rows_of_tile, strides
from .grouped_outer import place

TILES: tl.constexpr = tl.constexpr(8)  # of packed rows, whose chunks are added side by side


@triton.jit(do_not_specialize=["batch", "tokens"])
def _activation_backward_kernel(
    dy_ptr,  # (B, T, N)
    pre_ptr,  # (B, T, N), or None where neither an activation nor the sum for scale needs it
    scale_ptr,  # (E, N) or None
    expert_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    dz_ptr,  # (B, T, N) or None
    bias_ptr,  # (B, S, N) float32 or None
    dscale_ptr,  # (B, S, N) float32 or None
    batch,
    tokens,
    width,
    stride_yb,
    stride_yt,
    stride_pb,
    stride_pt,
    stride_db,
    stride_dt,
    stride_s,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # dz[b, t, n] = dy[b, t, n] * scale[e, n] * act'(pre[b, t, n])     with e = expert[b]
    # bias[b, s, n]   = sum over t in chunk s of dz[b, t, n]
    # dscale[b, s, n] = sum over t in chunk s of dy[b, t, n] * act(pre[b, t, n])
    #
    # One program computes chunk s of a tile, tokens s * CHUNK and on, x COLUMNS columns. It sums dz before rounding it.
    # Grid: B * S * cdiv(N, COLUMNS), S = cdiv(T, CHUNK), columns fastest.
    blocks = tl.cdiv(width, COLUMNS)
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(0) // blocks
    tile, begin, count, first = locate_rows(chunk, batch, tokens, None, cu_seqlens_ptr, CHUNK)
    b = begin.to(tl.int64)
    in_n = n < width
    if scale_ptr is not None:
        e = tl.load(expert_ptr + tile).to(tl.int64)
        scale = tl.load(scale_ptr + e * width + n, mask=in_n, other=0.0).to(tl.float32)
    bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dscale = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, CHUNK, ROWS):
        t = first + start + tl.arange(0, ROWS)
        inside = (t < count)[:, None] & in_n[None, :]
        t = t.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + b * stride_yb + t * stride_yt + n[None, :], mask=inside, other=0.0)
        dz = dy.to(tl.float32)
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + b * stride_pb + t * stride_pt + n[None, :]
            pre = tl.load(pre_ptrs, mask=inside, other=0.0).to(tl.float32)
        if dscale_ptr is not None:
            dscale += dz * activate(pre, ACTIVATION)
        if scale_ptr is not None:
            dz *= scale[None, :]
        if ACTIVATION != "none":
            dz *= activate_grad(pre, ACTIVATION)
        if bias_ptr is not None:
            bias += dz
        if dz_ptr is not None:
            dz_ptrs = dz_ptr + b * stride_db + t * stride_dt + n[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    part = chunk.to(tl.int64) * stride_s + n
    if bias_ptr is not None:
        tl.store(bias_ptr + part, tl.sum(bias, 0), mask=in_n)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + part, tl.sum(dscale, 0), mask=in_n)


@triton.jit(do_not_specialize=["chunks"])
def _sum_by_expert_kernel(
    part_ptr,  # (B, S, C) float32, C = WIDTH0 + WIDTH1 + WIDTH2; of packed rows (chunks, C)
    out0_ptr,  # (E, WIDTH0)
    out1_ptr,  # (E, WIDTH1)
    out2_ptr,  # (E, WIDTH2)
    order_ptr,  # (B,) int32
    offsets_ptr,  # (E + 1,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    chunks,
    stride_pb,
    stride_pt,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # out[e, c] = sum over b in order[offsets[e] : offsets[e + 1]], s of part[b, s, c]
    #
    # One program computes COLUMNS columns of one expert; its rows (b, s) are one list, and row r of it is added to sum
    # r % ROWS, so the order depends on nothing but the expert's own tiles. Of packed rows, whose tiles have chunks of
    # CHUNK rows each its own number of, chunk s of the i-th tile is added to one sum for i % TILES and s modulo the
    # rest. Grid: E * BLOCKS, the sum of cdiv(WIDTH_i, COLUMNS).
    e, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    in0, in1, width, before, first = place(block, WIDTH0, WIDTH1, WIDTH2, COLUMNS)
    c = first + tl.arange(0, COLUMNS)
    start = tl.load(offsets_ptr + e)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if cu_seqlens_ptr is None:
        rows = (tl.load(offsets_ptr + e + 1) - start) * chunks
        for first_row in range(0, rows, ROWS):
            r = first_row + tl.arange(0, ROWS)
            b = tl.load(order_ptr + start + r // chunks, mask=r < rows, other=0).to(tl.int64)
            at = b * stride_pb + (r % chunks).to(tl.int64) * stride_pt
            part_ptrs = part_ptr + at[:, None] + before + c[None, :]
            acc += tl.load(part_ptrs, mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0)
    else:
        r = tl.arange(0, ROWS)
        for first_tile in range(start, tl.load(offsets_ptr + e + 1), TILES):
            i = first_tile + r % TILES
            mine = i < tl.load(offsets_ptr + e + 1)
            b = tl.load(order_ptr + i, mask=mine, other=0)
            begin, count = rows_of_tile(b, 0, cu_seqlens_ptr)
            count = tl.where(mine, tl.cdiv(count, CHUNK), 0)
            for first_row in range(0, tl.max(count, 0), ROWS // TILES):
                s = first_row + r // TILES
                at = (first_block(b, begin, CHUNK) + s).to(tl.int64) * stride_pt
                part_ptrs = part_ptr + at[:, None] + before + c[None, :]
                inside = (s < count)[:, None] & (c < width)[None, :]
                acc += tl.load(part_ptrs, mask=inside, other=0.0)
    out_ptr = tl.where(in0, out0_ptr, tl.where(in1, out1_ptr, out2_ptr))
    total = tl.sum(acc, 0).to(out0_ptr.dtype.element_ty)
    tl.store(out_ptr + e.to(tl.int64) * width + c, total, mask=c < width)


def backward_parts(
    dy: Tensor,  # (B, T, N), packed (R, N); pre and dz likewise, and the parts (chunks, N) or (chunks, 2 N)
    pre: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    expert: Tensor,  # (B,) int32
    activation: str,
    needs_bias: bool,
    needs_scale: bool,
    needs_dz: bool = True,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor | None]:  # (B, T, N), (B, S, N) or (B, S, 2 N) float32
    """dz = dy * scale * act'(pre), and the parts of the sums for bias and for scale side by side, in one launch.

    dz is dy itself where there is neither an activation nor a scale. ``pre`` is read where there is an activation, or
    for scale.
    """
    dy = rows_dense(dy)
    unchanged = scale is None and activation == "none"
    needs_dz = needs_dz and not unchanged
    if not (needs_dz or needs_bias or needs_scale):
        return dy, None
    config = _configs.ACTIVATION_BACKWARD
    rows, width = Rows.of(dy, cu_seqlens), dy.shape[-1]
    pre = rows_dense(pre) if needs_scale or activation != "none" else None
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_dz else None
    columns = (needs_bias + needs_scale) * width
    shape = (*rows.blocks(config.chunk), columns)
    parts = dy.new_empty(shape, dtype=torch.float32) if columns else None
    args = {
        "dy_ptr": dy,
        "pre_ptr": pre,
        "scale_ptr": None if scale is None else scale.contiguous(),
        "expert_ptr": expert,
        "dz_ptr": dz,
        "bias_ptr": parts if needs_bias else None,
        "dscale_ptr": parts[..., -width:] if needs_scale else None,
        **rows.args,
        "width": width,
        **strides("stride_y{}", dy),
        **strides("stride_p{}", pre),
        **strides("stride_d{}", dz),
        "stride_s": columns,
        "ACTIVATION": activation,
        "CHUNK": config.chunk,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }
    grid = (rows.num_blocks(config.chunk) * triton.cdiv(width, config.columns),)
    _launch.launch(_activation_backward_kernel, grid, args, config)
    return dy if dz is None else dz, parts


def sum_by_expert(
    partial: Tensor,  # (B, S, C) float32, packed (chunks, C)
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    num_experts: int,
    dtype: torch.dtype,
    **packed: Any,
) -> Tensor:  # (E, C)
    """Sum over S and the tiles of each expert, in order; exact zeros for an expert without a tile."""
    ids = (order, offsets, num_experts)
    return sums_by_expert(partial, [partial.shape[-1]], *ids, dtype, **packed)[0]


def sums_by_expert(
    partial: Tensor,  # (B, S, C) float32, packed (chunks, C), C = sum of widths
    widths: list[int],
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    num_experts: int,
    dtype: torch.dtype,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
    chunk: int = _configs.ACTIVATION_BACKWARD.chunk,  # how many packed rows a row of ``partial`` is of
) -> list[Tensor]:  # each (E, widths[i])
    """The same as one tensor for each of ``widths``; one launch for up to three."""
    config = _configs.SUM_BY_EXPERT
    outs = [partial.new_empty(num_experts, width, dtype=dtype) for width in widths]
    for first in range(0, len(widths), WEIGHTS):
        out = outs[first : first + WEIGHTS]
        chosen = [o.shape[1] for o in out] + [0] * (WEIGHTS - len(out))
        blocks = sum(triton.cdiv(width, config.columns) for width in chosen)
        args = {
            "part_ptr": partial[..., sum(widths[:first]) :],
            **{f"out{i}_ptr": out[min(i, len(out) - 1)] for i in range(WEIGHTS)},
            "order_ptr": order,
            "offsets_ptr": offsets,
            "cu_seqlens_ptr": cu_seqlens,
            "chunks": partial.shape[-2],
            **strides("stride_p{}", partial),
            **{f"WIDTH{i}": width for i, width in enumerate(chosen)},
            "BLOCKS": blocks,
            "CHUNK": 0 if cu_seqlens is None else chunk,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
        }
        _launch.launch(_sum_by_expert_kernel, (num_experts * blocks,), args, config)
    return outs
