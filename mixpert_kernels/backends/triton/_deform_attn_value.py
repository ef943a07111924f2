"""The gradient of deform_attn's value: by atomics, or in a fixed order as a product that is built on the chip."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs as _chips
from . import _configs_deform_attn as _configs
from . import _launch
from ._deform_attn_points import along, centre, image_of, pixel, softmax
from ._tiles import Rows, locate_rows


@triton.jit(do_not_specialize=["queries"])
def _deform_attn_value_kernel(
    dy_ptr,  # (B, Q, HEADS * D)
    offsets_ptr,  # (B, Q, HEADS, POINTS, 2)
    logits_ptr,  # (B, Q, HEADS, POINTS)
    reference_ptr,  # (Q, 2)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    dvalue_ptr,  # (R, HEADS, D) float32, zeros before
    queries,
    HEADS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    # dvalue[corner c of point k, h, :] += a_k w[k, c] dy[b, q, h, :], in any order
    #
    # Programs, grid and threads as of the forward pass.
    BLOCKS: tl.constexpr = (HEADS * D + GROUPS * VECTOR - 1) // (GROUPS * VECTOR)
    blocks_q = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) // BLOCKS
    b = (block // blocks_q).to(tl.int64)
    q = block % blocks_q * QUERIES + tl.arange(0, QUERIES)[:, None]
    column = ((tl.program_id(0) % BLOCKS) * GROUPS + tl.arange(0, GROUPS)[None, :]) * VECTOR
    valid = (q < queries) & (column < HEADS * D)
    head = column // D
    height, width, begin = image_of(b, sizes_ptr, cu_seqlens_ptr)

    item = (b * queries + q) * HEADS + head
    weights = softmax(logits_ptr + item * POINTS, valid, POINTS)
    twice = 2 * (q + head * 0)
    whole_x, rest_x = centre(reference_ptr + twice, valid, width)
    whole_y, rest_y = centre(reference_ptr + twice + 1, valid, height)
    vector = tl.arange(0, VECTOR)[None, None, :]
    start = tl.multiple_of((b * queries + q) * (HEADS * D) + column, [VECTOR, VECTOR])[:, :, None]
    dy = tl.load(dy_ptr + start + vector, mask=valid[:, :, None], other=0.0).to(tl.float32)
    for k in tl.static_range(POINTS):
        offset = offsets_ptr + (item * POINTS + k) * 2
        x, part_x = pixel(offset, valid, whole_x, rest_x, width)
        y, part_y = pixel(offset + 1, valid, whole_y, rest_y, height)
        for corner in tl.static_range(4):
            in_x, weight_x = along(x, part_x, width, corner % 2)
            in_y, weight_y = along(y, part_y, height, corner // 2)
            row = (begin + (y + corner // 2) * width + x + corner % 2).to(tl.int64)
            start = tl.multiple_of(row * (HEADS * D) + column, [VECTOR, VECTOR])[:, :, None]
            seen = (valid & in_x & in_y)[:, :, None]
            part = (weights[k] * (weight_x * weight_y))[:, :, None] * dy
            tl.atomic_add(dvalue_ptr + start + vector, part, mask=seen, sem="relaxed")


def add_by_atomics(dy: Tensor, value: Tensor, shared: dict[str, Any]) -> Tensor:
    """dvalue (R, heads, d), added in float32 and cast; one launch, a memset, and a cast where it is not float32."""
    batch, queries, width = dy.shape
    vector = _configs.atomic_vector(_chips.chip(value.device), value.shape[2])
    block = _configs.columns(width, vector)
    dvalue = dy.new_zeros(value.shape, dtype=torch.float32)
    args = {
        "dy_ptr": dy,
        **shared,
        "dvalue_ptr": dvalue,
        "D": value.shape[2],
        "QUERIES": block.QUERIES,
        "GROUPS": block.GROUPS,
        "VECTOR": block.VECTOR,
    }
    columns = triton.cdiv(width, block.GROUPS * block.VECTOR)
    grid = (batch * triton.cdiv(queries, block.QUERIES) * columns,)
    _launch.launch(_deform_attn_value_kernel, grid, args, block)
    return dvalue.to(value.dtype)


@triton.jit
def hat(t):
    return tl.maximum(1.0 - tl.abs(t), 0.0)


@triton.jit(do_not_specialize=["batch", "rows", "queries"])
def _deform_attn_gather_kernel(
    dy_ptr,  # (B, Q, HEADS * D)
    offsets_ptr,  # (B, Q, HEADS, POINTS, 2)
    logits_ptr,  # (B, Q, HEADS, POINTS)
    reference_ptr,  # (Q, 2)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    dvalue_ptr,  # (R, HEADS, D)
    batch,
    rows,
    queries,
    HEADS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    # dvalue[cu_seqlens[b] + i W + j, h, :] = sum_q m[i W + j, q] dy[b, q, h, :]
    # m[i W + j, q] = sum_k a_k hat(x_k - j) hat(y_k - i),  hat(t) = max(0, 1 - |t|)
    #
    # One program computes ROWS patches of one image x COLUMNS columns of one head: a product whose left operand is made
    # in registers. Grid: (R // ROWS + B) * HEADS * cdiv(D, COLUMNS), columns and heads fastest, so that programs that
    # run together share dy. Queries are added upwards, whatever the batch. Those that see none of the program's lines
    # of patches are passed over: their m is 0.
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // (HEADS * BLOCKS)
    head = tl.program_id(0) // BLOCKS % HEADS
    image, begin, count, first = locate_rows(block, batch, rows, None, cu_seqlens_ptr, ROWS)
    if first < count:
        b = image.to(tl.int64)
        height, width, _ = image_of(b, sizes_ptr, cu_seqlens_ptr)
        row = first + tl.arange(0, ROWS)
        row_x = (row % width).to(tl.float32)[:, None]
        row_y = (row // width).to(tl.float32)[:, None]
        upper = first // width - 1
        lower = (first + ROWS - 1) // width
        d = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, queries, QUERIES):
            q = start + tl.arange(0, QUERIES)
            valid = q < queries
            item = (b * queries + q) * HEADS + head
            weights = softmax(logits_ptr + item * POINTS, valid, POINTS)
            whole_x, rest_x = centre(reference_ptr + 2 * q, valid, width)
            whole_y, rest_y = centre(reference_ptr + 2 * q + 1, valid, height)
            points = ()
            near = tl.zeros((QUERIES,), tl.int32)
            for k in tl.static_range(POINTS):
                offset = offsets_ptr + (item * POINTS + k) * 2
                x, part_x = pixel(offset, valid, whole_x, rest_x, width)
                y, part_y = pixel(offset + 1, valid, whole_y, rest_y, height)
                points += ((x.to(tl.float32), part_x, y.to(tl.float32), part_y),)
                near |= (valid & (y >= upper) & (y <= lower)).to(tl.int32)
            if tl.max(near, 0) > 0:
                m = tl.zeros((ROWS, QUERIES), tl.float32)
                for k in tl.static_range(POINTS):
                    patch_x, beyond_x, patch_y, beyond_y = points[k]
                    by_x = hat((patch_x[None, :] - row_x) + beyond_x[None, :])
                    by_y = hat((patch_y[None, :] - row_y) + beyond_y[None, :])
                    m += weights[k][None, :] * (by_x * by_y)
                at = dy_ptr + item[:, None] * D + d
                dy = tl.load(at, mask=valid[:, None] & (d < D), other=0.0).to(tl.float32)
                acc = tl.dot(m, dy, acc, input_precision=INPUT_PRECISION)
        at = ((begin + row).to(tl.int64) * HEADS + head)[:, None] * D + d
        inside = (row < count)[:, None] & (d < D)
        tl.store(dvalue_ptr + at, acc.to(dvalue_ptr.dtype.element_ty), mask=inside)


def gather(dy: Tensor, value: Tensor, shared: dict[str, Any]) -> Tensor:
    """dvalue (R, heads, d), added in a fixed order: one launch, of at most R Q heads (2 d + 10 points) operations."""
    rows, heads, d = value.shape
    block = _configs.gather(d)
    cu_seqlens = shared["cu_seqlens_ptr"]
    slots = Rows(cu_seqlens.shape[0] - 1, rows, cu_seqlens).num_blocks(block.ROWS)
    dvalue = value.new_empty(value.shape)
    args = {
        "dy_ptr": dy,
        **shared,
        "dvalue_ptr": dvalue,
        "batch": cu_seqlens.shape[0] - 1,
        "rows": rows,
        "D": d,
        "INPUT_PRECISION": _chips.gemm_precision(_chips.chip(value.device), value.dtype),
        "ROWS": block.ROWS,
        "COLUMNS": block.COLUMNS,
        "QUERIES": block.QUERIES,
    }
    grid = (slots * heads * triton.cdiv(d, block.COLUMNS),)
    _launch.launch(_deform_attn_gather_kernel, grid, args, block)
    return dvalue
