"""Where a block of rows lies: in tiles of one size, (B, T, ...), or in packed rows, (R, ...), cut by ``cu_seqlens``.

Tile b of packed rows is rows cu_seqlens[b] to cu_seqlens[b + 1]. Its blocks of BLOCK rows have the numbers from
``cu_seqlens[b] // BLOCK + b`` on: as many as it has blocks, or one more, which is empty. So there are
``R // BLOCK + B`` numbers, which the host knows, and a program finds its tile by bisection: no table of blocks is made,
and no launch depends on how rows are divided.

To kernels and host functions packed rows are one tile of R tokens whose first two strides are both a row's: what begins
at tile b of (B, T, ...) begins at row cu_seqlens[b] here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """The rows of x (B, T, D), or of packed x (R, D).

    Attributes:
        batch: B.
        tokens: T, or R.
        cu_seqlens: (B + 1,) int32, or None.
    """

    batch: int
    tokens: int
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None) -> Rows:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(batch, x.shape[-2], cu_seqlens)

    def blocks(self, size: int) -> tuple[int, ...]:
        """The shape of what has one entry for each block of ``size`` rows: (B, S), or of packed rows (blocks,)."""
        if self.cu_seqlens is None:
            return self.batch, triton.cdiv(self.tokens, size)
        return (self.tokens // size + self.batch,)

    def num_blocks(self, size: int) -> int:
        return math.prod(self.blocks(size))

    @property
    def args(self) -> dict[str, Any]:
        """The kernel's arguments of these names.

        Of tiles of one size ``locate_rows`` does not ask for ``batch``, and an argument that nobody reads may cost
        registers: a kernel that asks for it elsewhere is given it there.
        """
        batch = None if self.cu_seqlens is None else self.batch
        return {"cu_seqlens_ptr": self.cu_seqlens, "batch": batch, "tokens": self.tokens}


def strides(pattern: str, x: Tensor | None) -> dict[str, int]:
    """The kernel's arguments for steps from tile to tile and from row to row: of packed rows the same; 0 for None."""
    found = (0, 0) if x is None else (x.stride(0), x.stride(-2))
    return {pattern.format(name): step for name, step in zip("bt", found, strict=True)}


def as_tiles(x: Tensor) -> Tensor:
    """(1, R, D) of packed rows, for a descriptor: its boxes have three dimensions."""
    return x if x.ndim == 3 else x.unsqueeze(0)


@triton.jit
def count_row_blocks(batch, tokens, cu_seqlens_ptr, BLOCK: tl.constexpr):
    """``Rows.num_blocks``, on the device."""
    return batch * tl.cdiv(tokens, BLOCK) if cu_seqlens_ptr is None else tokens // BLOCK + batch


@triton.jit
def locate_rows(block, batch, tokens, order_ptr, cu_seqlens_ptr, BLOCK: tl.constexpr):
    """Number of a block of rows -> (its tile, where that begins, its rows, the block's first row within it).

    Tiles of one size come in the order of ``order_ptr``, or as they are where that is None; packed ones as they are.
    An empty block begins past its tile's rows.
    """
    if cu_seqlens_ptr is None:
        blocks = tl.cdiv(tokens, BLOCK)
        tile = block // blocks
        within = block % blocks
        if order_ptr is not None:
            tile = tl.load(order_ptr + tile)
    else:
        tile = block * 0
        end = tile + batch
        while end - tile > 1:
            middle = (tile + end) // 2
            begun = first_block(middle, tl.load(cu_seqlens_ptr + middle), BLOCK) <= block
            tile = tl.where(begun, middle, tile)
            end = tl.where(begun, end, middle)
        within = block - first_block(tile, tl.load(cu_seqlens_ptr + tile), BLOCK)
    begin, rows = rows_of_tile(tile, tokens, cu_seqlens_ptr)
    return tile, begin, rows, within * BLOCK


@triton.jit
def first_block(tile, begin, BLOCK: tl.constexpr):
    """Number of the first block of a tile of packed rows."""
    return begin // BLOCK + tile


@triton.jit
def rows_of_tile(tile, tokens, cu_seqlens_ptr):
    """Where a tile begins, in steps of the first stride, and how many rows it has."""
    begin = tile
    rows = tokens
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + tile)
        rows = tl.load(cu_seqlens_ptr + tile + 1) - begin
    return begin, rows


@triton.jit
def rows_before(begin, tokens, cu_seqlens_ptr):
    """How many rows there are before a tile, as int64: where it begins in a contiguous tensor."""
    count = begin.to(tl.int64)
    if cu_seqlens_ptr is None:
        count *= tokens
    return count


@triton.jit
def box_of(begin, row, cu_seqlens_ptr):
    """Where a descriptor of the features has a row of the tile that begins at ``begin``: first and second index."""
    far = begin
    near = row
    if cu_seqlens_ptr is not None:
        far = begin * 0
        near = begin + row
    return far, near
