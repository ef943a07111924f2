"""Defines deform_attn: image by image, so that an image's result is bitwise the same in any batch.

Positions are computed in float64: in float32 the place of a point in a wide image would have few digits left behind
the patch it is in. Everything else is in float32 or better.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Corners(NamedTuple):
    """The four patches around each point of an image, (Q, heads, points, 4).

    Attributes:
        row: i * W + j of patch (i, j), int64; outside the image H * W, a row of zeros after the last.
        weight: what the patch contributes to the sample.
        by_x, by_y: the derivatives of ``weight`` by the point's pixel coordinates.
    """

    row: Tensor
    weight: Tensor
    by_x: Tensor
    by_y: Tensor


def corners(offsets: Tensor, reference: Tensor, size: Tensor) -> Corners:
    """Of offsets (..., Q, heads, points, 2) and reference (Q, 2), in images of ``size`` (..., 2), which is (H, W)."""
    extent = size.flip(-1).double()  # (W, H)
    pixel = reference[:, None, None].double() * extent + offsets.double() - 0.5
    low = pixel.floor()
    part = (pixel - low).to(_accumulator(offsets))  # (..., Q, heads, points, 2)
    (x0, y0), (fx, fy) = low.unbind(-1), part.unbind(-1)
    x, y = torch.stack([x0, x0 + 1, x0, x0 + 1], -1), torch.stack([y0, y0, y0 + 1, y0 + 1], -1)
    one = torch.ones_like(fx)
    wx, wy = torch.stack([1 - fx, fx, 1 - fx, fx], -1), torch.stack([1 - fy, 1 - fy, fy, fy], -1)
    sign_x = torch.stack([-one, one, -one, one], -1)
    sign_y = torch.stack([-one, -one, one, one], -1)
    width, height = extent[..., :1], extent[..., 1:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = torch.where(inside, y * width + x, width * height).long()
    return Corners(row, wx * wy, sign_x * wy, wx * sign_y)


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _images(sizes: Tensor, cu_seqlens: Tensor, *batched: Tensor):
    """Of each image: its rows, its size, and its part of each batched tensor."""
    bounds = cu_seqlens.tolist()
    rows = [slice(*ends) for ends in itertools.pairwise(bounds)]
    return zip(rows, sizes, *batched, strict=True)


def _table(value: Tensor) -> Tensor:
    """The value (H * W, heads, d) of an image as ((H * W + 1) * heads, d), the last rows zeros."""
    return F.pad(value.to(_accumulator(value)), (0, 0, 0, 0, 0, 1)).flatten(0, 1)


def _in_table(row: Tensor, heads: int) -> Tensor:
    """Rows of an image (Q, heads, points, 4) -> rows of its table."""
    return row * heads + torch.arange(heads, device=row.device)[:, None, None]


def deform_attn(
    value: Tensor,  # (R, heads, d)
    offsets: Tensor,  # (B, Q, heads, points, 2)
    logits: Tensor,  # (B, Q, heads, points)
    reference: Tensor,  # (Q, 2)
    sizes: Tensor,  # (B, 2) int32
    cu_seqlens: Tensor,  # (B + 1,) int32
) -> Tensor:  # (B, Q, heads * d)
    dtype, heads = _accumulator(value), value.shape[1]
    found = []
    for rows, size, offsets_b, logits_b in _images(sizes, cu_seqlens, offsets, logits):
        near = corners(offsets_b, reference, size)
        patches = _table(value[rows])[_in_table(near.row, heads)]  # (Q, heads, points, 4, d)
        weight = logits_b.to(dtype).softmax(-1)[..., None] * near.weight
        found.append((weight[..., None] * patches).sum((2, 3)).flatten(1))
    return torch.stack(found).to(value.dtype)


def deform_attn_backward(
    dy: Tensor,  # (B, Q, heads * d)
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    sizes: Tensor,
    cu_seqlens: Tensor,
    deterministic: bool,
    needs: list[bool],  # of value, offsets, logits, reference
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # those that are needed, in their tensors' shapes; else empty
    dtype, (_, heads, d) = _accumulator(value), value.shape
    dvalue, doffsets, dlogits = [], [], []
    dreference = torch.zeros(reference.shape, dtype=dtype, device=reference.device)
    batch = _images(sizes, cu_seqlens, offsets, logits, dy)
    for rows, size, offsets_b, logits_b, dy_b in batch:
        near = corners(offsets_b, reference, size)
        g = dy_b.to(dtype).view(-1, heads, 1, 1, d)  # of every corner of a query and head
        table = _table(value[rows])
        at = _in_table(near.row, heads)
        weight = logits_b.to(dtype).softmax(-1)
        if needs[0]:
            parts = (weight[..., None] * near.weight)[..., None] * g
            sums = torch.zeros_like(table).index_add_(0, at.flatten(), parts.flatten(0, 3))
            dvalue.append(sums.view(-1, heads, d)[:-1])
        along = (table[at] * g).sum(-1)  # (Q, heads, points, 4)
        dweight = (along * near.weight).sum(-1)
        dlogits.append(weight * (dweight - (weight * dweight).sum(-1, keepdim=True)))
        dpixel = torch.stack([(along * near.by_x).sum(-1), (along * near.by_y).sum(-1)], -1)
        doffsets.append(weight[..., None] * dpixel)
        dreference += doffsets[-1].sum((1, 2)) * size.flip(0)
    grads = (
        torch.cat(dvalue).to(value.dtype) if needs[0] else None,
        torch.stack(doffsets).to(offsets.dtype),
        torch.stack(dlogits).to(logits.dtype),
        dreference.to(reference.dtype),
    )
    return tuple(g if need else dy.new_empty(0) for g, need in zip(grads, needs, strict=True))
