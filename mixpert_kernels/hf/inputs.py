"""Checks of what a tower is called with, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.routing import check_ids

OP = "FusedMixpertTower"


def check_pixels(pixels: Tensor, config: object, device: torch.device, *, any_size: bool) -> None:
    """Raise ValueError unless ``pixels`` (B, C, H, W) suits the vision model of ``config``."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"{OP}: pixel_values must be a floating-point tensor, got {got}")
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise ValueError(
            f"{OP}: pixel_values must have shape (B, C, H, W), none of them 0, got {tuple(pixels.shape)}"
        )
    channels = getattr(config, "num_channels", 3)
    if pixels.shape[1] != channels:
        raise ValueError(f"{OP}: pixel_values must have {channels} channels, got {pixels.shape[1]}")
    if pixels.device != device:
        raise ValueError(
            f"{OP}: pixel_values must be on the tower's device, {device}, got {pixels.device}"
        )
    height, width = pixels.shape[2:]
    least = pair(config.patch_size)
    if height < least[0] or width < least[1]:
        raise ValueError(
            f"{OP}: pixel_values must be at least one patch of {least} in size, got {(height, width)}"
        )
    size = getattr(config, "image_size", None)
    if not any_size and size is not None and (height, width) != pair(size):
        raise ValueError(
            f"{OP}: pixel_values must have size {pair(size)} (or pass interpolate_pos_encoding=True), "
            f"got {(height, width)}"
        )


def resolve_images(
    image_of_tile: Tensor | None, base_tile: Tensor | None, tiles: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return both on ``device`` as int64, ``base_tile`` defaulting to each image's first tile; check their values.

    Values are checked where reading them is free: on a CPU, outside torch.compile. So pass them as CPU tensors, which
    is what tile counts come as.
    """
    if image_of_tile is None:
        if base_tile is not None:
            raise ValueError(f"{OP}: base_tile must come with image_of_tile, got it alone")
        return None, None
    check_ids(OP, "image_of_tile", image_of_tile)
    if image_of_tile.shape[0] != tiles:
        raise ValueError(
            f"{OP}: image_of_tile must have one entry a tile, {tiles}, got {image_of_tile.shape[0]}"
        )
    readable = image_of_tile.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        _check_image_of_tile(image_of_tile)
    if base_tile is None:
        if not readable:
            raise ValueError(
                f"{OP}: base_tile must be given where image_of_tile can't be read (on {image_of_tile.device}, or under "
                "torch.compile), got None"
            )
        images = torch.arange(int(image_of_tile[-1]) + 1)
        base_tile = torch.searchsorted(image_of_tile.to(torch.int64), images)
    check_ids(OP, "base_tile", base_tile)
    if readable and base_tile.device.type == "cpu":
        _check_base_tile(base_tile, image_of_tile)
    return (
        image_of_tile.to(device, torch.int64, non_blocking=True),
        base_tile.to(device, torch.int64, non_blocking=True),
    )


def images_of(
    x: Tensor, image_of_tile: Tensor | None, base_tile: Tensor | None, expert: Tensor | None
) -> dict[str, Tensor | None]:
    """What the routing ops are told of the images of features x (B, T, D), on their device."""
    image_of_tile, base_tile = resolve_images(image_of_tile, base_tile, x.shape[0], x.device)
    expert = None if expert is None else expert.to(x.device, non_blocking=True)
    return {"image_of_tile": image_of_tile, "base_tile": base_tile, "expert": expert}


def check_forced(expert: Tensor, images: int, num_experts: int) -> None:
    """Raise ValueError unless ``expert`` (I,) holds an expert id for each image."""
    check_ids(OP, "expert", expert, num_experts)
    if expert.shape[0] != images:
        raise ValueError(
            f"{OP}: expert must have one entry an image, {images}, got {expert.shape[0]}"
        )


def _check_image_of_tile(image_of_tile: Tensor) -> None:
    steps = image_of_tile.diff(prepend=image_of_tile.new_zeros(1))
    if int(image_of_tile[0]) != 0 or bool((steps < 0).any()):
        raise ValueError(f"{OP}: image_of_tile must ascend from 0, got {_shown(image_of_tile)}")
    if bool((steps > 1).any()):
        raise ValueError(f"{OP}: image_of_tile must have no gaps, got {_shown(image_of_tile)}")


def _check_base_tile(base_tile: Tensor, image_of_tile: Tensor) -> None:
    images = int(image_of_tile[-1]) + 1
    if base_tile.shape[0] != images:
        raise ValueError(
            f"{OP}: base_tile must have one entry an image, {images}, got {len(base_tile)}"
        )
    inside = (base_tile >= 0) & (base_tile < len(image_of_tile))
    if not bool(inside.all()) or not torch.equal(
        image_of_tile[base_tile.long()].long(), torch.arange(images)
    ):
        raise ValueError(
            f"{OP}: base_tile must name a tile of each image in turn, got {_shown(base_tile)}"
        )


def _shown(ids: Tensor) -> str:
    return str(ids[:16].tolist()) + ("..." if len(ids) > 16 else "")


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
