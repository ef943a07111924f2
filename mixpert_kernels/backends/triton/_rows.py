"""LayerNorm of a block of rows: what every kernel that normalises shares, so that all agree bit for bit.

A row stays in registers, as a tuple of parts with LANES columns each, and is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs


def aligned_rows(x: Tensor | None) -> Tensor | None:
    """x with adjacent numbers in a row and, where its width allows, rows on multiples of 16 bytes; else a copy."""
    if x is None:
        return None
    vector = _configs.vector(x.shape[-1], x.element_size())
    starts = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) == 1 and all(start % vector == 0 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def row_pointers(ptr, b, t, stride_b, stride_t, VECTOR: tl.constexpr):
    """Where rows t of tile b begin, (ROWS, 1); every row begins a multiple of VECTOR elements after ptr."""
    offset = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    return ptr + tl.multiple_of(offset, VECTOR)[:, None]


@triton.jit
def load_rows(rows, valid, D: tl.constexpr, LANES: tl.constexpr):
    """The rows as cdiv(D, LANES) parts (ROWS, LANES) in float32; 0 past D and where not valid (ROWS, 1)."""
    parts = ()
    for first in tl.static_range(0, D, LANES):
        d = first + tl.arange(0, LANES)[None, :]
        inside = valid if first + LANES <= D else valid & (d < D)
        parts += (tl.load(rows + d, mask=inside, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def load_gain(ptr, e, i: tl.constexpr, rows, D: tl.constexpr, LANES: tl.constexpr):
    """Part i of row e of a table (E, D), in float32, as (ROWS, LANES).

    Each row of the block loads it anew, from L1: one copy for all would go through shared memory, with two barriers.
    """
    d = i * LANES + tl.arange(0, LANES)[None, :] + tl.zeros(rows.shape, tl.int32)
    return tl.load(ptr + e * D + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def mean_of_rows(total, D: tl.constexpr):
    """Sum of (ROWS, LANES) over the row, by D: (ROWS, 1)."""
    return tl.div_rn(tl.sum(total, 1, keep_dims=True), D * 1.0)


@triton.jit
def row_statistics(parts, eps, D: tl.constexpr, LANES: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps), (ROWS, 1) each, of rows from load_rows; the variance from x - mean."""
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    mean = mean_of_rows(total, D)
    squares = tl.zeros(total.shape, tl.float32)
    for i in tl.static_range(len(parts)):
        d = i * LANES + tl.arange(0, LANES)[None, :]
        away = parts[i] - mean
        away = away if (i + 1) * LANES <= D else tl.where(d < D, away, 0.0)
        squares = tl.fma(away, away, squares)
    return mean, tl.rsqrt(mean_of_rows(squares, D) + eps)


@triton.jit
def store_normalised(
    parts, mean, rstd, w_ptr, c_ptr, e, y, valid, D: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """y[d] = (x[d] - mean) rstd w[e, d] + c[e, d] for rows from load_rows; y points at rows, c_ptr may be None."""
    for i in tl.static_range(len(parts)):
        d = i * LANES + tl.arange(0, LANES)[None, :]
        inside = valid if (i + 1) * LANES <= D else valid & (d < D)
        h = (parts[i] - mean) * rstd
        w = load_gain(w_ptr, e, i, y, D, LANES)
        out = h * w if c_ptr is None else tl.fma(h, w, load_gain(c_ptr, e, i, y, D, LANES))
        tl.store(y + d, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def normalise_rows(
    x,  # pointers (ROWS, 1)
    y,  # pointers (ROWS, 1)
    w_ptr,  # (E, D)
    c_ptr,  # (E, D) or None
    e,  # int64
    valid,  # (ROWS, 1)
    eps,
    D: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) rstd w[e] + c[e] for a block of rows; returns mean and rstd (ROWS, 1).

    Kernels that call this with the LANES of ``_configs.layer_norm`` agree bit for bit: every sum and product is made
    in an order that neither the number of warps nor the place of a row in its block changes.
    """
    parts = load_rows(x, valid, D, LANES)
    mean, rstd = row_statistics(parts, eps, D, LANES)
    store_normalised(parts, mean, rstd, w_ptr, c_ptr, e, y, valid, D, LANES)
    return mean, rstd
