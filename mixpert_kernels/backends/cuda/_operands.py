"""What kernels ask of their operands: rows that begin at multiples of 16 bytes; copies where they do not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

# Weights that one launch reads or gradients that it writes: query, key and value.
WEIGHTS = 3
ALIGNMENT = 16  # bytes; what cp.async and vector loads move at once


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Rows(NamedTuple):
    """The rows of a batch as kernels count them (csrc/cuda/packed.cuh)."""

    cu_seqlens: Tensor | None  # (B + 1,) int32 for packed rows
    batch: int
    tokens: int  # T, or R of packed rows

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None) -> Rows:
        """Of (B, T, D), or (R, D) with ``cu_seqlens``."""
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(cu_seqlens, batch, x.shape[-2])

    def slots(self, size: int) -> tuple[int, ...]:
        """The shape of what holds something for every block of up to so many rows of one tile.

        (B, ceil(T / size)), or of packed rows (R // size + B,), of which some stay empty.
        """
        if self.cu_seqlens is None:
            return self.batch, cdiv(self.tokens, size)
        return (self.tokens // size + self.batch,)

    def blocks(self, size: int) -> int:
        """How many those are."""
        return math.prod(self.slots(size))

    def arguments(self) -> dict[str, Any]:
        return self._asdict()


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row (along the last dimension, dense) of the tensors begins at a multiple of 16 bytes."""
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % ALIGNMENT == 0
        and all(s * t.element_size() % ALIGNMENT == 0 for s in t.stride()[:-1])
        for t in tensors
        if t is not None
    )


def padded(tensor: Tensor) -> Tensor:
    """The tensor with rows that begin at multiples of 16 bytes and are as long, which zeros follow where they were not.

    A copy where needed: rows of an odd number of halves cannot be what cp.async reads.
    """
    width, numbers = tensor.shape[-1], ALIGNMENT // tensor.element_size()
    if width % numbers == 0 and aligned(tensor):
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], cdiv(width, numbers) * numbers)
    wide[..., :width] = tensor
    return wide


def aligned_pieces(width: int, *tensors: Tensor | None) -> bool:
    """Whether dense rows of this width fall into pieces of four numbers that can be moved at once."""
    return width % 4 == 0 and all(
        t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors if t is not None
    )


def rows_dense(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def named(pattern: str, tensors: list[Tensor]) -> dict[str, Tensor | None]:
    """A kernel's arguments that are given once for each weight, None for weights that there are not."""
    return {pattern.format(i): t for i, t in enumerate([*tensors, *[None] * WEIGHTS][:WEIGHTS])}


def alike(weights: list[Tensor]) -> int:
    """How many of the weights, from the first on, one launch can read: of one shape, layout and dtype."""
    first = weights[0]
    count = 1
    for w in weights[1:WEIGHTS]:
        if (w.shape, w.stride(), w.dtype) != (first.shape, first.stride(), first.dtype):
            break
        count += 1
    return count


def strides(pattern: str, tensor: Tensor | None, names: str) -> dict[str, int]:
    """A kernel's arguments that are the tensor's strides, 0 without a tensor.

    Packed rows have one, which stands for that of tiles too.
    """
    found = (0,) * len(names) if tensor is None else tensor.stride()
    if tensor is not None and tensor.ndim == 2:
        found = found[:1] * 2
    return {pattern.format(name): s for name, s in zip(names, found, strict=False)}
