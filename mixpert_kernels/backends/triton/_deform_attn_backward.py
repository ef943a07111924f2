"""The backward of deform_attn: one launch for offsets and logits, one for value, one for the sums of reference."""

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
from ._deform_attn_value import add_by_atomics, gather
from ._rows import aligned_rows


@triton.jit(do_not_specialize=["queries", "stride_r", "stride_h"])
def _deform_attn_backward_kernel(
    dy_ptr,  # (B, Q, HEADS * D)
    value_ptr,  # (R, HEADS, D)
    offsets_ptr,  # (B, Q, HEADS, POINTS, 2)
    logits_ptr,  # (B, Q, HEADS, POINTS)
    reference_ptr,  # (Q, 2)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    doffsets_ptr,  # as offsets, or None
    dlogits_ptr,  # as logits, or None
    parts_ptr,  # (B, Q, HEADS, 2) float32, or None
    queries,
    stride_r,
    stride_h,
    HEADS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    ITEMS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    # s[k, c] = <dy[b, q, h], value[corner c of point k, h]>, and with w and a as in the forward pass
    # da_k = sum_c w[k, c] s[k, c],   dlogits_k = a_k (da_k - sum_j a_j da_j)
    # doffsets_k = a_k sum_c s[k, c] (dw[k, c] / dx, dw[k, c] / dy)
    # parts = sum_k doffsets_k (W, H): reference[q]'s, of this image and head
    #
    # One program computes ITEMS pairs (q, h) of one image. Grid: B * cdiv(Q * HEADS, ITEMS). A pair's sums are made in
    # one order, whatever the batch.
    blocks = tl.cdiv(queries * HEADS, ITEMS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)
    valid = i < queries * HEADS
    item = b * (queries * HEADS) + i
    head = (i % HEADS).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    height, width, begin = image_of(b, sizes_ptr, cu_seqlens_ptr)

    grads = ()
    start = tl.multiple_of(item * D, VECTOR)[:, None]
    for first in tl.static_range(0, D, LANES):
        inside = valid[:, None] & (first + lane < D)
        grads += (tl.load(dy_ptr + start + first + lane, mask=inside, other=0.0).to(tl.float32),)

    weights = softmax(logits_ptr + item * POINTS, valid, POINTS)
    at = reference_ptr + 2 * (i // HEADS)
    whole_x, rest_x = centre(at, valid, width)
    whole_y, rest_y = centre(at + 1, valid, height)
    dweights = ()
    mean = tl.zeros((ITEMS,), tl.float32)
    sum_x, sum_y = mean, mean
    for k in tl.static_range(POINTS):
        offset = offsets_ptr + (item * POINTS + k) * 2
        x, part_x = pixel(offset, valid, whole_x, rest_x, width)
        y, part_y = pixel(offset + 1, valid, whole_y, rest_y, height)
        dweight = tl.zeros((ITEMS,), tl.float32)
        by_x, by_y = dweight, dweight
        for corner in tl.static_range(4):
            in_x, weight_x = along(x, part_x, width, corner % 2)
            in_y, weight_y = along(y, part_y, height, corner // 2)
            row = (begin + (y + corner // 2) * width + x + corner % 2).to(tl.int64)
            start = tl.multiple_of(row * stride_r + head * stride_h, VECTOR)[:, None]
            seen = (valid & in_x & in_y)[:, None]
            products = tl.zeros((ITEMS, LANES), tl.float32)
            for c in tl.static_range(len(grads)):
                inside = seen & (c * LANES + lane < D)
                patch = tl.load(value_ptr + start + c * LANES + lane, mask=inside, other=0.0)
                products += grads[c] * patch.to(tl.float32)
            s = tl.sum(products, 1)
            dweight += weight_x * weight_y * s
            by_x += (2 * (corner % 2) - 1) * weight_y * s
            by_y += (2 * (corner // 2) - 1) * weight_x * s
        by_x *= weights[k]
        by_y *= weights[k]
        if doffsets_ptr is not None:
            at = doffsets_ptr + (item * POINTS + k) * 2
            tl.store(at, by_x.to(doffsets_ptr.dtype.element_ty), mask=valid)
            tl.store(at + 1, by_y.to(doffsets_ptr.dtype.element_ty), mask=valid)
        sum_x += by_x
        sum_y += by_y
        mean += weights[k] * dweight
        dweights += (dweight,)
    if dlogits_ptr is not None:
        for k in tl.static_range(POINTS):
            dlogit = (weights[k] * (dweights[k] - mean)).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + item * POINTS + k, dlogit, mask=valid)
    if parts_ptr is not None:
        tl.store(parts_ptr + item * 2, sum_x * width.to(tl.float32), mask=valid)
        tl.store(parts_ptr + item * 2 + 1, sum_y * height.to(tl.float32), mask=valid)


@triton.jit(do_not_specialize=["batch", "queries"])
def _deform_attn_reference_kernel(
    parts_ptr,  # (B, Q, HEADS, 2) float32
    dreference_ptr,  # (Q, 2)
    batch,
    queries,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    # dreference[q, c] = sum_b sum_h parts[b, q, h, c], image by image
    #
    # One program adds NUMBERS numbers (q, c). Grid: cdiv(2 Q, NUMBERS).
    n = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    h = tl.arange(0, BLOCK_H)[None, :]
    first = ((n // 2) * (2 * HEADS) + n % 2)[:, None]
    inside = (n < 2 * queries)[:, None] & (h < HEADS)
    acc = tl.zeros((NUMBERS,), tl.float32)
    at = parts_ptr + first + 2 * h
    step = tl.cast(queries, tl.int64) * (2 * HEADS)
    for _ in range(batch):
        acc += tl.sum(tl.load(at, mask=inside, other=0.0), 1)
        at += step
    tl.store(dreference_ptr + n, acc.to(dreference_ptr.dtype.element_ty), mask=n < 2 * queries)


def value_rows(value: Tensor) -> tuple[Tensor, int]:
    """``value`` with adjacent numbers in a head, and how many of them a thread may read at once: 16 bytes, or one."""
    value = aligned_rows(value)
    return value, _chips.vector(value.shape[2], value.element_size())


def image_args(
    offsets: Tensor, logits: Tensor, reference: Tensor, sizes: Tensor, cu_seqlens: Tensor
) -> dict[str, Any]:
    """The kernels' arguments of these names."""
    return {
        "offsets_ptr": offsets.contiguous(),
        "logits_ptr": logits.contiguous(),
        "reference_ptr": reference.contiguous(),
        "sizes_ptr": sizes,
        "cu_seqlens_ptr": cu_seqlens,
        "queries": logits.shape[1],
        "HEADS": logits.shape[2],
        "POINTS": logits.shape[3],
    }


def deform_attn_backward(
    dy: Tensor,  # (B, Q, heads * d)
    value: Tensor,  # (R, heads, d)
    offsets: Tensor,  # (B, Q, heads, points, 2)
    logits: Tensor,  # (B, Q, heads, points)
    reference: Tensor,  # (Q, 2)
    sizes: Tensor,  # (B, 2) int32
    cu_seqlens: Tensor,  # (B + 1,) int32
    deterministic: bool,
    needs: list[bool],  # of value, offsets, logits, reference
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # those that are needed, in their tensors' shapes; else empty
    dy = dy.contiguous()
    shared = image_args(offsets, logits, reference, sizes, cu_seqlens)
    dvalue, doffsets, dlogits, dreference = (dy.new_empty(0) for _ in needs)
    if needs[0]:
        dvalue = (gather if deterministic else add_by_atomics)(dy, value, shared)
    if needs[1]:
        doffsets = offsets.new_empty(offsets.shape)
    if needs[2]:
        dlogits = logits.new_empty(logits.shape)
    parts = dy.new_empty(*logits.shape[:3], 2, dtype=torch.float32) if needs[3] else None
    if any(needs[1:]):
        found = {
            "doffsets_ptr": doffsets if needs[1] else None,
            "dlogits_ptr": dlogits if needs[2] else None,
            "parts_ptr": parts,
        }
        _places_backward(dy, value, shared | found)
    if needs[3]:
        dreference = _sum_of_parts(parts, reference.dtype)
    return dvalue, doffsets, dlogits, dreference


def _places_backward(dy: Tensor, value: Tensor, shared: dict[str, Any]) -> None:
    """doffsets, dlogits, and each image's and head's part of dreference."""
    value, vector = value_rows(value)
    batch, queries, heads, _ = shared["logits_ptr"].shape
    block = _configs.items(value.shape[2])
    args = {
        "dy_ptr": dy,
        "value_ptr": value,
        **shared,
        "stride_r": value.stride(0),
        "stride_h": value.stride(1),
        "D": value.shape[2],
        "VECTOR": vector,
        "ITEMS": block.ITEMS,
        "LANES": block.LANES,
    }
    grid = (batch * triton.cdiv(queries * heads, block.ITEMS),)
    _launch.launch(_deform_attn_backward_kernel, grid, args, block)


def _sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    batch, queries, heads, _ = parts.shape
    block = _configs.SumsConfig()
    dreference = parts.new_empty(queries, 2, dtype=dtype)
    args = {
        "parts_ptr": parts,
        "dreference_ptr": dreference,
        "batch": batch,
        "queries": queries,
        "HEADS": heads,
        "BLOCK_H": triton.next_power_of_2(heads),
        "NUMBERS": block.NUMBERS,
    }
    grid = (triton.cdiv(2 * queries, block.NUMBERS),)
    _launch.launch(_deform_attn_reference_kernel, grid, args, block)
    return dreference
