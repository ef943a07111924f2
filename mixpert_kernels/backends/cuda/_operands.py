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


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """A new tensor of this shape whose rows are as long as they must be for all to be aligned."""
    numbers = ALIGNMENT // like.element_size()
    return like.new_empty(*shape[:-1], cdiv(shape[-1], numbers) * numbers)[..., : shape[-1]]


def aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor; copied if its rows are not aligned, as those of an odd number of halves cannot be."""
    if aligned(tensor):
        return tensor
    return empty_rows(tensor, *tensor.shape).copy_(tensor)


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
