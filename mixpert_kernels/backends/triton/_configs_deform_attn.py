"""Blocks of the kernels of deform_attn. No row depends on the batch, the queries or the sizes of images.

None has been measured on a GPU yet: they follow from what a warp reads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixpert_kernels.backends.chips import Chip

THREADS = 128  # of a program, four warps


@dataclass(frozen=True)
class ColumnsConfig:
    """A program serves QUERIES queries x GROUPS groups of VECTOR adjacent columns; a thread one query and group.

    Groups are of all heads side by side, so no lane idles at d = 96: 768 columns are 3 programs of 32 groups of 8.
    """

    QUERIES: int
    GROUPS: int
    VECTOR: int
    num_warps: int = THREADS // 32
    num_stages: int = 1


@dataclass(frozen=True)
class ItemsConfig:
    """A program serves ITEMS pairs of query and head, LANES columns at a time.

    32 columns divide 96 and 128, so that no lane idles; four threads read them in half precision, eight in float32,
    and a sum over columns is two or three exchanges between neighbours. One warp: its stores of a number a pair would
    pass through shared memory, with two barriers each, if there were more.
    """

    ITEMS: int
    LANES: int
    num_warps: int = 1
    num_stages: int = 1


@dataclass(frozen=True)
class GatherConfig:
    """A program serves ROWS patches of an image x COLUMNS of a head, and reads all queries, QUERIES at a time."""

    ROWS: int
    COLUMNS: int
    QUERIES: int
    num_warps: int = 8
    num_stages: int = 1


@dataclass(frozen=True)
class SumsConfig:
    """A program adds NUMBERS numbers over images and heads."""

    NUMBERS: int = 64
    num_warps: int = 4
    num_stages: int = 1


def columns(width: int, vector: int) -> ColumnsConfig:
    """For rows of ``width`` numbers of all heads, ``vector`` of which a thread reads at once."""
    groups = min(32, 1 << (width // vector - 1).bit_length())
    return ColumnsConfig(THREADS // groups, groups, vector)


def items(d: int) -> ItemsConfig:
    """For heads of ``d`` numbers."""
    return ItemsConfig(8, min(32, 1 << (d - 1).bit_length()))


def atomic_vector(on: Chip, d: int) -> int:
    """How many adjacent numbers of dvalue a thread adds to at once: four where the chip has an instruction for it.

    Elsewhere a warp adds to 32 adjacent numbers, four whole sectors.
    """
    return 4 if on.arch >= 90 and d % 4 == 0 else 1


def gather(d: int) -> GatherConfig:
    """For heads of ``d`` numbers; a wider one than 128 is served by several programs."""
    return GatherConfig(64, max(16, min(128, 1 << (d - 1).bit_length())), 32)
