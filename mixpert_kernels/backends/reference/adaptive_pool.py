"""Defines adaptive_pool: PyTorch's own, image by image, so that an image's result is bitwise the same in any batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import tiles


def adaptive_pool(
    x: Tensor,  # (R, C)
    sizes: Tensor,  # (B, 2) int32, H and W
    cu_seqlens: Tensor,  # (B + 1,) int32
    height: int,
    width: int,
) -> Tensor:  # (B, height * width, C)
    images = zip(tiles(x, cu_seqlens), sizes.tolist(), strict=True)
    pooled = [
        F.adaptive_avg_pool2d(_image(x_b, *size), (height, width)).flatten(2).mT
        for x_b, size in images
    ]
    return torch.cat(pooled).to(x.dtype)


def adaptive_pool_backward(
    dy: Tensor,  # (B, height * width, C)
    sizes: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    height: int,
    width: int,
) -> Tensor:  # (R, C)
    grads = [
        torch.ops.aten._adaptive_avg_pool2d_backward(
            _image(dy_b, height, width), _image(dy_b[:1].expand(h * w, -1), h, w)
        )
        .flatten(2)
        .mT[0]
        for dy_b, (h, w) in zip(dy, sizes.tolist(), strict=True)
    ]
    return torch.cat(grads).to(dy.dtype)


def _image(rows: Tensor, height: int, width: int) -> Tensor:
    """(H * W, C) as PyTorch's (1, C, H, W), in float32 or better."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.unflatten(0, (height, width)).permute(2, 0, 1)[None]
