"""deform_attn on a CPU: a query and head's samples are one weighted bag of rows, and all images' bags are one call.

A bag has a row for each corner that lies in its image, added in their order: an image's result is bitwise the same in
any batch. Backward is bags again: those of a row of ``value`` hold the queries that saw it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.deform_attn import Corners, corners

_bag = torch.ops.aten._embedding_bag_forward_only
_SUM = 0  # embedding_bag's mode


class Bags(NamedTuple):
    """The bags of a batch; N corners lie in their image.

    Attributes:
        near: of every point, (B, Q, heads, points, 4).
        weights: softmax of the logits, float32, (B, Q, heads, points).
        seen: where in ``near`` the N corners are, flat.
        row: of ``table``, (N,).
        begins: where each bag begins in them, (B * Q * heads,).
        table: the rows of ``value``, (.., d) float32.
        step: rows of the table from one row of ``value`` to the next.
    """

    near: Corners
    weights: Tensor
    seen: Tensor
    row: Tensor
    begins: Tensor
    table: Tensor
    step: int

    @property
    def scale(self) -> Tensor:
        """What each corner counts in its bag, (N,)."""
        return (self.weights[..., None] * self.near.weight).flatten()[self.seen]


def _bags(value, offsets, logits, reference, sizes, cu_seqlens) -> Bags:
    heads = value.shape[1]
    near = corners(offsets, reference, sizes[:, None, None, None])
    table, step = _table(value)
    inside = near.row < sizes.prod(1).view(-1, 1, 1, 1, 1)
    seen = inside.flatten().nonzero().squeeze(1)
    row = (near.row + cu_seqlens[:-1].view(-1, 1, 1, 1, 1)) * step
    row += torch.arange(heads)[:, None, None]
    ends = inside.flatten(3).sum(-1).flatten().cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    weights = logits.float().softmax(-1)
    return Bags(near, weights, seen, row.flatten()[seen], begins, table, step)


def _table(value: Tensor) -> tuple[Tensor, int]:
    """Rows (.., d) float32 that hold those of ``value``, and how many lie between two of its rows.

    A slice of all layers' values is read where it is.
    """
    rows, heads, d = value.shape
    if value.dtype != torch.float32 or value.stride()[1:] != (d, 1) or value.stride(0) % d:
        value = value.float().contiguous()
    step = value.stride(0) // d
    return value.as_strided(((rows - 1) * step + heads, d), (d, 1)), step


def deform_attn(
    value: Tensor,  # (R, heads, d)
    offsets: Tensor,  # (B, Q, heads, points, 2)
    logits: Tensor,  # (B, Q, heads, points)
    reference: Tensor,  # (Q, 2)
    sizes: Tensor,  # (B, 2) int32
    cu_seqlens: Tensor,  # (B + 1,) int32
) -> Tensor:  # (B, Q, heads * d)
    bags = _bags(value, offsets, logits, reference, sizes, cu_seqlens)
    y, *_ = _bag(bags.table, bags.row, bags.begins, False, _SUM, False, bags.scale)
    return y.view(*logits.shape[:2], -1).to(value.dtype)


def deform_attn_backward(
    dy: Tensor,  # (B, Q, heads * d)
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    sizes: Tensor,
    cu_seqlens: Tensor,
    deterministic: bool,  # it always is
    needs: list[bool],  # of value, offsets, logits, reference
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # those that are needed, in their tensors' shapes; else empty
    dvalue, doffsets, dlogits, dreference = (dy.new_empty(0) for _ in needs)
    bags = _bags(value, offsets, logits, reference, sizes, cu_seqlens)
    grads = dy.float().reshape(-1, value.shape[2])  # (B * Q * heads, d)
    bag = bags.seen // (4 * logits.shape[3])
    if needs[0]:
        dvalue = _by_row(bags, bag, grads, value)
    if any(needs[1:]):
        along = torch.zeros(bags.near.weight.shape)
        along.view(-1)[bags.seen] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grads, bags.table, bags.row, bags.begins, bag, _SUM
        )
        _, weight, by_x, by_y = bags.near
        dweight = (along * weight).sum(-1)
        mean = (bags.weights * dweight).sum(-1, keepdim=True)
        dlogits = (bags.weights * (dweight - mean)).to(logits.dtype) if needs[2] else dlogits
        dpixel = torch.stack([(along * by_x).sum(-1), (along * by_y).sum(-1)], -1)
        dpixel *= bags.weights[..., None]
        doffsets = dpixel.to(offsets.dtype) if needs[1] else doffsets
    if needs[3]:
        extent = sizes.flip(1)[:, None]
        dreference = (dpixel.sum((2, 3)) * extent).sum(0).to(reference.dtype)
    return dvalue, doffsets, dlogits, dreference


def _by_row(bags: Bags, bag: Tensor, grads: Tensor, value: Tensor) -> Tensor:
    """Of each row of ``value`` the sum of what the bags that hold it took, in their order."""
    rows, heads, d = value.shape
    row = bags.row if bags.step == heads else bags.row // bags.step * heads + bags.row % bags.step
    row, order = row.sort(stable=True)
    begins = torch.searchsorted(row, torch.arange(rows * heads))
    dvalue, *_ = _bag(grads, bag[order], begins, False, _SUM, False, bags.scale[order])
    return dvalue.view(rows, heads, d).to(value.dtype)
