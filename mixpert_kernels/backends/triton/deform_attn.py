"""deform_attn: one launch a batch, whatever the sizes of its images."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _configs_deform_attn as _configs
from . import _launch
from ._deform_attn_backward import deform_attn_backward as deform_attn_backward
from ._deform_attn_backward import image_args, value_rows
from ._deform_attn_points import along, centre, image_of, pixel, softmax


@triton.jit(do_not_specialize=["queries", "stride_r", "stride_h"])
def _deform_attn_kernel(
    value_ptr,  # (R, HEADS, D)
    offsets_ptr,  # (B, Q, HEADS, POINTS, 2)
    logits_ptr,  # (B, Q, HEADS, POINTS)
    reference_ptr,  # (Q, 2)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    y_ptr,  # (B, Q, HEADS * D)
    queries,
    stride_r,
    stride_h,
    HEADS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    # y[b, q, h, :] = sum_k a_k sum_{i, j} hat(y_k - i) hat(x_k - j) value[cu_seqlens[b] + i W + j, h, :]
    # a = softmax(logits[b, q, h]),  (x_k, y_k) = reference[q] (W, H) + offsets[b, q, h, k] - 1/2
    # hat(t) = max(0, 1 - |t|)
    #
    # One program computes QUERIES queries of one image x GROUPS groups of VECTOR columns. Grid: B * cdiv(Q, QUERIES) *
    # cdiv(HEADS * D, GROUPS * VECTOR), columns fastest. A thread has one query and one group, finds its points itself,
    # and has 4 POINTS loads of VECTOR numbers in flight: nothing goes through shared memory.
    # Strides and Q are not specialised: where an image lies must not change its sums.
    BLOCKS: tl.constexpr = (HEADS * D + GROUPS * VECTOR - 1) // (GROUPS * VECTOR)
    blocks_q = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) // BLOCKS
    b = (block // blocks_q).to(tl.int64)
    q = block % blocks_q * QUERIES + tl.arange(0, QUERIES)[:, None]
    column = ((tl.program_id(0) % BLOCKS) * GROUPS + tl.arange(0, GROUPS)[None, :]) * VECTOR
    valid = (q < queries) & (column < HEADS * D)
    head = (column // D).to(tl.int64)
    height, width, begin = image_of(b, sizes_ptr, cu_seqlens_ptr)

    item = (b * queries + q) * HEADS + head  # (QUERIES, GROUPS)
    weights = softmax(logits_ptr + item * POINTS, valid, POINTS)
    twice = 2 * (q + head * 0)
    whole_x, rest_x = centre(reference_ptr + twice, valid, width)
    whole_y, rest_y = centre(reference_ptr + twice + 1, valid, height)
    vector = tl.arange(0, VECTOR)[None, None, :]
    acc = tl.zeros((QUERIES, GROUPS, VECTOR), tl.float32)
    for k in tl.static_range(POINTS):
        offset = offsets_ptr + (item * POINTS + k) * 2
        x, part_x = pixel(offset, valid, whole_x, rest_x, width)
        y, part_y = pixel(offset + 1, valid, whole_y, rest_y, height)
        for corner in tl.static_range(4):
            in_x, weight_x = along(x, part_x, width, corner % 2)
            in_y, weight_y = along(y, part_y, height, corner // 2)
            row = (begin + (y + corner // 2) * width + x + corner % 2).to(tl.int64)
            start = row * stride_r + head * stride_h + column % D
            start = tl.multiple_of(start, [VECTOR, VECTOR])[:, :, None]
            seen = (valid & in_x & in_y)[:, :, None]
            patch = tl.load(value_ptr + start + vector, mask=seen, other=0.0).to(tl.float32)
            acc += (weights[k] * (weight_x * weight_y))[:, :, None] * patch
    start = tl.multiple_of((b * queries + q) * (HEADS * D) + column, [VECTOR, VECTOR])[:, :, None]
    tl.store(y_ptr + start + vector, acc.to(y_ptr.dtype.element_ty), mask=valid[:, :, None])


def deform_attn(
    value: Tensor,  # (R, heads, d)
    offsets: Tensor,  # (B, Q, heads, points, 2)
    logits: Tensor,  # (B, Q, heads, points)
    reference: Tensor,  # (Q, 2)
    sizes: Tensor,  # (B, 2) int32
    cu_seqlens: Tensor,  # (B + 1,) int32
) -> Tensor:  # (B, Q, heads * d)
    value, vector = value_rows(value)
    batch, queries, heads, _ = logits.shape
    width = heads * value.shape[2]
    block = _configs.columns(width, vector)
    y = value.new_empty(batch, queries, width)
    args = {
        "value_ptr": value,
        **image_args(offsets, logits, reference, sizes, cu_seqlens),
        "y_ptr": y,
        "stride_r": value.stride(0),
        "stride_h": value.stride(1),
        "D": value.shape[2],
        "QUERIES": block.QUERIES,
        "GROUPS": block.GROUPS,
        "VECTOR": block.VECTOR,
    }
    columns = triton.cdiv(width, block.GROUPS * block.VECTOR)
    grid = (batch * triton.cdiv(queries, block.QUERIES) * columns,)
    _launch.launch(_deform_attn_kernel, grid, args, block)
    return y
