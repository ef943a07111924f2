"""What kernels ask of their operands: rows that begin at multiples of 16 bytes; copies where they do not."""

from __future__ import annotations

from torch import Tensor

# Weights that one launch reads or gradients that it writes: query, key and value.
WEIGHTS = 3
ALIGNMENT = 16  # bytes; what cp.async and vector loads move at once


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


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
    """A kernel's arguments that are the tensor's strides, 0 without a tensor."""
    found = (0,) * len(names) if tensor is None else tensor.stride()
    return {pattern.format(name): s for name, s in zip(names, found, strict=False)}
