"""Runs of neighbouring tiles that share an expert: what the CPU ops work on."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def runs(expert: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Split a batch into runs of one expert: (expert, first tile, past-the-last tile), or rows where it is packed."""
    bounds = range(len(expert) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    found, first = [], 0
    for e, tiles in itertools.groupby(expert.tolist()):
        last = first + len(list(tiles))
        found.append((e, bounds[first], bounds[last]))
        first = last
    return [run for run in found if run[1] < run[2]]  # tiles may be without rows


def join(parts: list[Tensor]) -> Tensor:
    """The runs' results as one batch; no copy where there is one run."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
