"""Routing: the one carrier of a routing decision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which expert serves each tile of a batch.

    Everything lives on the device of the features; nothing here is ever read by the host on a GPU. ``order`` and
    ``offsets`` list the tiles expert by expert: expert ``e`` serves tiles ``order[offsets[e]:offsets[e + 1]]``. They
    steer the visiting order of kernels and the weight gradients; results never depend on them.

    Tiles of one size are features (B, T, D). Tiles of different sizes are packed rows (R, D), one tile after the other,
    and ``cu_seqlens`` says where each begins: tile ``b`` is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``, maybe none.
    """

    expert: Tensor  # (B,) int32
    order: Tensor  # (B,) int32, tiles sorted by expert, stable
    offsets: Tensor  # (E + 1,) int32
    scores: Tensor | None = (
        None  # (I, E) float32, the router's probabilities; None for a forced route
    )
    cu_seqlens: Tensor | None = None  # (B + 1,) int32, ascending from 0 to R; None: (B, T, D)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def ids(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What backends take of it, in the order they take it: all but the scores."""
        return self.expert, self.order, self.offsets, self.cu_seqlens

    def resized(self, rows: int, of: int) -> Routing:
        """The routing of ``rows`` packed rows that are made of these, ``of`` in number.

        A vision tower's merger puts k neighbouring rows into one: k times fewer, and k divides each tile's rows. A view
        by heads makes more. All that is not packed stays what it is.

        Raises:
            ValueError: the rows do not come out even; on a CPU, also where those of a single tile do not.
        """
        if self.cu_seqlens is None or rows == of:
            return self
        most, least = max(rows, of), min(rows, of)
        if least < 1 or most % least:
            raise ValueError(f"Routing.resized: rows must divide {of} or be a multiple, got {rows}")
        k = most // least
        if rows > of:
            return Routing(*self[:4], self.cu_seqlens * k)
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            odd = [bound for bound in self.cu_seqlens.tolist() if bound % k]
            if odd:
                raise ValueError(
                    f"Routing.resized: every tile must begin at a multiple of {k}, got {odd[0]}"
                )
        return Routing(*self[:4], self.cu_seqlens // k)

    @classmethod
    def forced(
        cls,
        expert: Tensor,
        num_experts: int,
        scores: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Routing:
        """Send tile ``b`` to ``expert[b]`` (teacher routing).

        Args:
            expert: (B,) integer tensor, 0 <= expert < num_experts. Values are checked on a CPU; on a GPU a check would
                make the host wait, so they are not.
            num_experts: E.
            scores: (I, E) router probabilities to carry along.
            cu_seqlens: (B + 1,) int32 for packed rows; the ops check it, since they know R.

        Raises:
            ValueError: wrong rank, dtype or, on a CPU, an id out of range.

        Example:
            >>> Routing.forced(torch.tensor([2, 0, 2]), 3).offsets
            tensor([0, 1, 1, 3], dtype=torch.int32)
        """
        check_expert_ids("Routing.forced", expert, num_experts)
        return cls(*counting_sort(expert, num_experts), scores, cu_seqlens)

    @classmethod
    def single(cls, batch: int, device: torch.device | str | None = None) -> Routing:
        """Route every tile to the only expert there is: what a shared (not cloned) layer uses."""
        tiles = torch.arange(batch, dtype=torch.int32, device=device)
        offsets = torch.arange(2, dtype=torch.int32, device=device) * batch  # no copy from the host
        return cls(torch.zeros_like(tiles), tiles, offsets)


def counting_sort(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (expert, order, offsets) as int32, without a data-dependent shape or host read."""
    ids, order = torch.sort(expert.to(torch.int32), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=expert.device)
    offsets = torch.searchsorted(ids, bounds, out_int32=True)
    return expert.to(torch.int32), order.to(torch.int32), offsets


def tile_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Return the tile of each of R packed rows, (R,) int32, without a host read."""
    return torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)


def check_expert_ids(caller: str, expert: Tensor, num_experts: int) -> None:
    """Raise ValueError unless ``expert`` is a 1-D integer tensor of ids below ``num_experts``."""
    if num_experts < 1:
        raise ValueError(f"{caller}: num_experts must be at least 1, got {num_experts}")
    check_ids(caller, "expert", expert, num_experts)


def check_ids(caller: str, name: str, ids: Tensor, count: int | None = None) -> None:
    """Raise ValueError unless ``ids`` is a 1-D integer tensor; on a CPU, also unless each lies below ``count``."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{caller}: {name} must be an integer tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{caller}: {name} must have dtype int32 or int64, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"{caller}: {name} must have 1 dimension, got shape {tuple(ids.shape)}")
    if count is None or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise ValueError(f"{caller}: {name} must lie in 0..{count - 1}, got {int(wrong[0])}")


def check_bounds(caller: str, name: str, cu_seqlens: Tensor, rows: int, of: str = "x") -> None:
    """Raise ValueError unless ``cu_seqlens`` ascends from 0 to the R rows of an argument, where that costs no wait."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(
            f"{caller}: {name} must ascend from 0 to the {rows} rows of {of}, got {bounds}"
        )
