"""adaptive_pool: each image's H x W features averaged to a grid of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.grids import Grids, require_grids

from ._checks import require, require_floating, require_shape
from ._library import register, register_gradient, register_no_second_gradient


def adaptive_pool(
    x: Tensor,  # (R, C)
    grids: Grids,
    *,
    height: int = 16,
    width: int = 16,
    backend: str = "auto",
) -> Tensor:  # (B, height * width, C)
    """Average each image's patches over a grid of height x width bins, as PyTorch's ``adaptive_avg_pool2d`` does.

    ``y[b, i * width + j] = mean of x over rows floor(i H / height) .. ceil((i + 1) H / height) - 1 of image b and
    columns floor(j W / width) .. ceil((j + 1) W / width) - 1``. Bins overlap where the sizes do not divide, and repeat
    patches where H < height or W < width.

    Args:
        x: (R, C) floating point, the patches of all images, row by row (``Grids``).
        grids: H and W of each image; they differ from image to image.
        height: bins from top to bottom.
        width: bins from left to right.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, height * width, C) in the dtype of ``x``; sums are accumulated in float32 (float64 for float64). An image's
        result is bitwise the same alone and in any batch.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on a CPU, also if H W of an image is not the
            number of its rows.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output. One launch a batch, and one for backward, which needs nothing of the forward pass. Never
        waits for a GPU, but for the ``reference`` backend.

    Example:
        >>> x = torch.arange(6.0)[:, None]  # one image of 2 x 3 patches
        >>> adaptive_pool(x, Grids.of([(2, 3)]), height=1, width=2).flatten()
        tensor([2., 3.])

    Source: docs/math.md, adaptive_pool.
    """
    op = "adaptive_pool"
    require_floating(op, "x", x)
    require_shape(op, "x", x, "R", "C")
    require(height >= 1, op, "height", "be at least 1", height)
    require(width >= 1, op, "width", "be at least 1", width)
    require_grids(op, grids, x, "x")
    return torch.ops.mixpert.adaptive_pool(x, *grids, height, width, backend)


def _pick(backend, x):
    return pick("adaptive_pool", backend, widths=x.shape[-1:], device=x.device, dtype=x.dtype)


def _run(x, sizes, cu_seqlens, height, width, backend):
    return _pick(backend, x).adaptive_pool(x, sizes, cu_seqlens, height, width)


def _fake(x, sizes, cu_seqlens, height, width, backend):
    return x.new_empty(sizes.shape[0], height * width, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, sizes, cu_seqlens, ctx.height, ctx.width, ctx.backend = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(sizes, cu_seqlens)


def _backward(ctx, dy):
    sizes, cu_seqlens = ctx.saved_tensors
    dx = torch.ops.mixpert.adaptive_pool_backward(
        dy, sizes, cu_seqlens, ctx.rows, ctx.height, ctx.width, ctx.backend
    )
    return dx, *[None] * 5


def _run_backward(dy, sizes, cu_seqlens, rows, height, width, backend):
    chosen = _pick(backend, dy)
    return chosen.adaptive_pool_backward(dy, sizes, cu_seqlens, rows, height, width)


def _fake_backward(dy, sizes, cu_seqlens, rows, height, width, backend):
    return dy.new_empty(rows, dy.shape[-1])


register(
    "adaptive_pool(Tensor x, Tensor sizes, Tensor cu_seqlens, int height, int width, str backend) -> Tensor",
    _run,
    _fake,
)
register(
    "adaptive_pool_backward(Tensor dy, Tensor sizes, Tensor cu_seqlens, SymInt rows, int height, int width, "
    "str backend) -> Tensor",
    _run_backward,
    _fake_backward,
)
register_gradient("adaptive_pool", _backward, _setup_context)
register_no_second_gradient("adaptive_pool")
