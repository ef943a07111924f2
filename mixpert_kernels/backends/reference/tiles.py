"""The tiles of a batch in either of its forms: (B, T, ...), or packed rows (R, ...) that ``cu_seqlens`` divides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixpert_kernels.routing import tile_of_row


def tiles(x: Tensor, cu_seqlens: Tensor | None) -> Sequence[Tensor]:
    """The tiles of x. Of packed rows the host has to know how long they are: it waits for a GPU."""
    return x.unbind() if cu_seqlens is None else x.split(cu_seqlens.diff().tolist())


def joined(tiles: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """The batch of these tiles."""
    return torch.stack(tiles) if cu_seqlens is None else torch.cat(tiles)


def own_memory(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The tiles of x, each in memory of its own: BLAS may round differently at another alignment."""
    return [tile.clone() for tile in tiles(x, cu_seqlens)]


def spread(table: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A row (B, N) for each tile of x, as it multiplies x: (B, 1, N), or (R, N)."""
    return table[:, None] if cu_seqlens is None else table[tile_of_row(cu_seqlens, x.shape[0])]
