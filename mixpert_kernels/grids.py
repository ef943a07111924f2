"""Grids: which packed rows of features are which image's patches, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.routing import check_bounds


class Grids(NamedTuple):
    """Where each image's H x W grid of patches lies in packed features (R, C).

    Image ``b`` is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``, its patch (i, j) is row ``cu_seqlens[b] + i * W + j``.
    H and W differ from image to image. Both tensors live on the device of the features and are never read by the host
    on a GPU; ``cu_seqlens`` is what ``Routing`` calls so.

    Attributes:
        sizes: (B, 2) int32, H and W of each image, at least 1.
        cu_seqlens: (B + 1,) int32, the sums of H W from 0 to R.
    """

    sizes: Tensor
    cu_seqlens: Tensor

    @property
    def batch(self) -> int:
        return self.sizes.shape[0]

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[int, int]], device: torch.device | str | None = None
    ) -> Grids:
        """The grids of images whose sizes the host knows; the device is not waited for.

        Args:
            sizes: (H, W) in patches, one pair an image.
            device: of the features.

        Raises:
            ValueError: no image, or a size below 1.

        Example:
            >>> Grids.of([(2, 3), (1, 4)]).cu_seqlens
            tensor([ 0,  6, 10], dtype=torch.int32)
        """
        if not len(sizes):
            raise ValueError("Grids.of: sizes must hold at least one (H, W), got none")
        flat, bounds = [], [0]
        for size in sizes:
            height, width = (int(n) for n in size)
            if height < 1 or width < 1:
                raise ValueError(f"Grids.of: sizes must be at least 1 x 1, got {height} x {width}")
            flat += [height, width]
            bounds.append(bounds[-1] + height * width)
        both = torch.tensor([*flat, *bounds], dtype=torch.int32)
        if device is not None and torch.device(device).type == "cuda":
            both = both.pin_memory()  # so that the copy need not wait for the stream
        both = both.to(device, non_blocking=True)
        return cls(both[: len(flat)].view(-1, 2), both[len(flat) :])

    @classmethod
    def same(
        cls, batch: int, height: int, width: int, device: torch.device | str | None = None
    ) -> Grids:
        """The grids of ``batch`` images of one size, without a copy from the host.

        Raises:
            ValueError: a number below 1.

        Example:
            >>> Grids.same(2, 2, 3).sizes
            tensor([[2, 3],
                    [2, 3]], dtype=torch.int32)
        """
        for name, n in (("batch", batch), ("height", height), ("width", width)):
            if n < 1:
                raise ValueError(f"Grids.same: {name} must be at least 1, got {n}")
        like = {"dtype": torch.int32, "device": device}
        sizes = torch.stack([torch.full((batch,), n, **like) for n in (height, width)], 1)
        return cls(sizes, torch.arange(batch + 1, **like) * (height * width))


def require_grids(op: str, grids: Grids, rows: Tensor, name: str) -> None:
    """Raise ValueError unless ``grids`` can be those of ``rows`` (R, ...), an argument of that name.

    Whether H W of the images come to R is checked on a CPU alone: on a GPU the host would wait.
    """
    if not isinstance(grids, Grids):
        raise ValueError(f"{op}: grids must be Grids, got {type(grids).__name__}")
    batch = grids.sizes.shape[0]
    for field, tensor, shape in zip(grids._fields, grids, ((batch, 2), (batch + 1,)), strict=True):
        if tensor.shape != shape or batch < 1:
            want = "(B, 2)" if field == "sizes" else f"({batch + 1},)"
            raise ValueError(
                f"{op}: grids.{field} must have shape {want}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: grids.{field} must have dtype int32, got {tensor.dtype}")
        if tensor.device != rows.device:
            raise ValueError(
                f"{op}: grids.{field} must be on the device of {name}, {rows.device}, got {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: grids.{field} must be contiguous, got strides {tensor.stride()}"
            )
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for b, ((height, width), n) in enumerate(
        zip(grids.sizes.tolist(), grids.cu_seqlens.diff().tolist(), strict=True)
    ):
        if height < 1 or width < 1 or height * width != n:
            raise ValueError(
                f"{op}: grids must have as many rows an image as H * W, "
                f"got {n} rows for image {b} of {height} x {width}"
            )
    check_bounds(op, "grids.cu_seqlens", grids.cu_seqlens, rows.shape[0], name)
