"""adaptive_pool on a CPU: each image over one axis, then over the other, a slice of whole rows of channels at a time.

PyTorch's own sums each channel of a bin by itself; slices are added up as vectors. It is 16 + 16 calls an image.
"""

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.adaptive_pool import (
    adaptive_pool_backward as adaptive_pool_backward,
)
from mixpert_kernels.backends.reference.tiles import tiles


def adaptive_pool(
    x: Tensor,  # (R, C)
    sizes: Tensor,  # (B, 2) int32, H and W
    cu_seqlens: Tensor,  # (B + 1,) int32
    height: int,
    width: int,
) -> Tensor:  # (B, height * width, C)
    y = x.new_empty(sizes.shape[0], height, width, x.shape[1], dtype=torch.float32)
    for pooled, rows, (h, w) in zip(y, tiles(x, cu_seqlens), sizes.tolist(), strict=True):
        axes = (1, 0) if h * width <= height * w else (0, 1)  # the smaller of the two in between
        image = rows.unflatten(0, (h, w))
        between = (h, width) if axes[0] == 1 else (height, w)
        _pool(image, axes[0], half := pooled.new_empty(*between, x.shape[1]))
        _pool(half, axes[1], pooled)
    return y.flatten(1, 2).to(x.dtype)


def _pool(cells: Tensor, axis: int, out: Tensor) -> None:
    """Average (., ., C) over the bins of an axis, as many as ``out`` has there."""
    n, bins = cells.shape[axis], out.shape[axis]
    for i, mean in enumerate(out.unbind(axis)):
        first, end = i * n // bins, -(-(i + 1) * n // bins)
        torch.mean(cells.narrow(axis, first, end - first), axis, dtype=out.dtype, out=mean)
