"""What the frozen encoders make of all images of a seed: computed once, for all arms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.grids import Grids
from mixpert_kernels.modules.move import Features

from .encoders import ENCODERS


class Store(NamedTuple):
    """An encoder's features of N images, packed.

    Attributes:
        rows: (R, C) float16: half the room; the rounding is the same for all arms.
        sizes: (N, 2) int64, H and W of each image.
        cls: (N, C) float16, or None.
    """

    rows: Tensor
    sizes: Tensor
    cls: Tensor | None

    def select(self, index: Tensor) -> Features:
        """The features of some images, (B,) int64, in float32."""
        counts = self.sizes.prod(1)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sizes = self.sizes[index]
        grids = Grids.of([(h, w) for h, w in sizes.tolist()])
        # row r of image b of the batch lies at bounds[index[b]] + r
        shift = bounds[index] - grids.cu_seqlens[:-1].long()
        place = torch.arange(int(grids.cu_seqlens[-1])) + shift.repeat_interleave(counts[index])
        cls = None if self.cls is None else self.cls[index].float()
        return Features(self.rows[place].float(), grids, cls)


def pack(parts: list[Features]) -> Store:
    """The features of several parts as one store."""
    sizes = torch.cat([part.grids.sizes.long() for part in parts])
    found = [part.cls for part in parts if part.cls is not None]
    cls = torch.cat(found).half() if found else None
    return Store(torch.cat([part.rows for part in parts]).half(), sizes, cls)


def path(folder: Path, seed: int, name: str, split: str) -> Path:
    return folder / f"seed-{seed}" / f"features-{name}-{split}.pt"


def save(store: Store, target: Path) -> None:
    """Write a store as a whole or not at all."""
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    torch.save(tuple(store), draft)
    os.replace(draft, target)


def load(
    folder: Path, seed: int, split: str, names: tuple[str, ...] = ENCODERS
) -> dict[str, Store]:
    """The features of a split's images, by encoder."""
    return {
        name: Store(*torch.load(path(folder, seed, name, split), weights_only=True))
        for name in names
    }
