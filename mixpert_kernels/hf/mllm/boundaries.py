"""Which tiles are crops of one image: read from what a model is called with, without waiting for the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Images(NamedTuple):
    """The images of a batch of B tiles.

    With ``padded``, the number of images is not known to the host: ``base_tile`` has an entry a tile, those after the
    last image are dead. With ``cu_seqlens`` the tower takes packed rows, and tile ``b`` is rows
    ``cu_seqlens[b]:cu_seqlens[b + 1]`` of them.
    """

    image_of_tile: Tensor | None = None  # (B,) int64; None: a tile is an image
    base_tile: Tensor | None = None  # (I,) int64
    padded: bool = False
    cu_seqlens: Tensor | None = None  # (B + 1,) int32

    def tiles(self, x: Tensor) -> int:
        """B, of features x (B, T, D) or packed rows x (R, D)."""
        return len(x) if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def from_counts(counts: Sequence[int], base: str) -> Images:
    """Images of so many tiles each; ``base``: whether an image's ``first`` or ``last`` tile shows the whole of it."""
    image_of_tile = [image for image, tiles in enumerate(counts) for _ in range(tiles)]
    ends = list(itertools.accumulate(counts))
    base_tile = [
        end - (1 if base == "last" else tiles) for end, tiles in zip(ends, counts, strict=True)
    ]
    return Images(torch.tensor(image_of_tile), torch.tensor(base_tile))


def from_grids(grids: Tensor) -> Images:
    """An image, or a video, is one tile of so many packed patches.

    Args:
        grids: (B, 3) integers: frames, rows and columns of each one's patches.
    """
    ends = grids.prod(-1).cumsum(0, dtype=torch.int32)
    return Images(cu_seqlens=torch.nn.functional.pad(ends, (1, 0)))


def from_runs(input_ids: Tensor, token: int, tiles: int, tokens_per_tile: int) -> Images:
    """A run of image tokens is an image, its last tile the base tile (InternVL).

    Args:
        input_ids: (P, S) integers, the prompts.
        token: the image token's id.
        tiles: B.
        tokens_per_tile: how many image tokens stand for one tile.
    """
    mask = input_ids == token
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    run = (mask & ~before).flatten().cumsum(0) - 1  # a prompt's start ends a run
    image_of_tile = run[_first_tokens(mask, tiles, tokens_per_tile)].clamp(min=0)
    return _with_last_tiles(image_of_tile)


def from_last_runs(input_ids: Tensor, token: int, tiles: int, tokens_per_tile: int) -> Images:
    """A run of image tokens is a tile; an image ends with its base tile (Idefics3, SmolVLM).

    The token before a base tile's run says that it is one. No configuration has its id, but the last run of all is a
    base tile's. Arguments: as for ``from_runs``.
    """
    mask = input_ids == token
    first = _first_tokens(mask, tiles, tokens_per_tile)
    announced = input_ids.flatten()[(first - 1).clamp(min=0)]  # (B,)
    is_base = (announced == announced[-1]).long()
    return _with_last_tiles(is_base.cumsum(0) - is_base)


def _first_tokens(mask: Tensor, tiles: int, tokens_per_tile: int) -> Tensor:
    """Flat positions (B,) of each tile's first token; prompts too short for their tiles are the model's to refuse."""
    count = mask.flatten().cumsum(0)
    wanted = torch.arange(tiles, device=mask.device) * tokens_per_tile + 1
    return torch.searchsorted(count, wanted).clamp(max=count.shape[0] - 1)


def _with_last_tiles(image_of_tile: Tensor) -> Images:
    tiles = torch.arange(len(image_of_tile), device=image_of_tile.device)
    base = torch.full_like(tiles, len(tiles) - 1)
    base = base.scatter_reduce(0, image_of_tile, tiles, "amax", include_self=False)
    return Images(image_of_tile, base, padded=True)
