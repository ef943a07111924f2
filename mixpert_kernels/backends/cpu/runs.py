"""Runs of neighbouring tiles that share an expert: what the CPU ops work on."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def runs(expert: Tensor) -> list[tuple[int, int, int]]:
    """Split a batch into runs of one expert: (expert, first tile, past-the-last tile)."""
    found, first = [], 0
    for e, tiles in itertools.groupby(expert.tolist()):
        last = first + len(list(tiles))
        found.append((e, first, last))
        first = last
    return found


def join(parts: list[Tensor]) -> Tensor:
    """The runs' results as one batch; no copy where there is one run."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
