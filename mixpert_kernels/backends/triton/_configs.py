"""Every tile size, number of warps and number of stages of the Triton kernels, with the reason for it.

A kernel's table lists rows; the first that serves a call is taken. Nothing here depends on the number of tiles or of
tokens: a result must not depend on the batch, and a new batch size must not compile anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mixpert_kernels.backends.chips import (  # noqa: F401
    AMD_SHARED_BYTES,
    KB,
    SHARED_BYTES,
    Chip,
    autotuning,
    chip,
    nvidia,
    tma_allowed,
)

from ._configs_gemm import (  # noqa: F401
    GEMM_ROWS,
    GemmConfig,
    fastest,
    gemm_precision,
    gemm_rows,
    table,
    uses_tma,
)

# ---- grouped_layer_norm ----


@dataclass(frozen=True)
class LayerNormRow:
    """Who sums a row.

    Attributes:
        width: the row serves D up to here.
        warps_a_row: how many warps share a row. A thread holds D / (32 * warps_a_row) values of it.
        num_warps: of a program; a multiple of ``warps_a_row``.
    """

    width: int
    warps_a_row: int
    num_warps: int


@dataclass(frozen=True)
class LayerNormBlock:
    """A program's rows and columns; a thread loads VECTOR adjacent numbers at a time.

    The order of a row's sums follows from LANES alone while ``ROWS * LANES`` gives every thread one load: kernels that
    agree on LANES agree bit for bit, whatever their number of warps.
    """

    ROWS: int
    LANES: int
    VECTOR: int
    num_warps: int
    num_stages: int = 1


LAYER_NORM = (
    LayerNormRow(2048, 1, 4),  # 768, 1024, 1152: a warp a row, so that no sum leaves the warp
    LayerNormRow(8192, 4, 4),  # 4304: 64 values a thread at most, through shared memory once a sum
    LayerNormRow(2**31, 8, 8),  # any; compiled without spills up to 16384
)
LAYER_NORM_BACKWARD = (
    LayerNormRow(1024, 2, 4),  # x, dy and two sums live at once: at most 16 columns a thread
    LayerNormRow(4096, 4, 4),  # 1152, which with two warps a row spills in float32 on sm_120
    LayerNormRow(2**31, 8, 8),  # without spills up to 8192; wider rows spill, and are right
)
LAYER_NORM_TOKENS = 32  # a program of the backward adds this many rows before it writes its part of dweight and dbias


def layer_norm(
    width: int, itemsize: int, *, backward: bool = False, num_warps: int = 0
) -> LayerNormBlock:
    """The block for rows of ``width`` numbers; ``num_warps`` where another kernel than the table's computes it."""
    rows = LAYER_NORM_BACKWARD if backward else LAYER_NORM
    row = next(row for row in rows if width <= row.width)
    numbers = vector(width, itemsize)
    lanes = min(1 << (width - 1).bit_length(), 32 * row.warps_a_row * numbers)
    warps = num_warps or row.num_warps
    return LayerNormBlock(max(1, 32 * warps * numbers // lanes), lanes, numbers, warps)


def vector(width: int, itemsize: int) -> int:
    """How many numbers a thread loads at once: 16 bytes of them if rows of ``width`` numbers keep to that, else one.

    One, and not two or four, where a row's start has an alignment that depends on which row it is.
    """
    return 16 // itemsize if width * itemsize % 16 == 0 else 1


# ---- route ----


@dataclass(frozen=True)
class RouteConfig:
    """Who pools and who scores. Scores do not depend on it, apart from ``rows``: they group the sum over tokens.

    Attributes:
        width: the row serves D up to here.
        rows: tokens a program pools; a multiple of 8.
        block_d: columns it pools at a time.
    """

    width: int
    rows: int
    block_d: int
    num_warps: int
    num_stages: int = 1


ROUTE = (
    RouteConfig(
        2048, 32, 256, 8
    ),  # 23 programs an image of 729 tokens; 64 values a thread while partials are added
    RouteConfig(2**31, 32, 512, 16),  # 64 values a thread up to D = 4096
)


@dataclass(frozen=True)
class RouteSums:
    """Blocks of the sums over images in the backward: of a weight's gradient, and of the ids searched for a tile."""

    block_n: int
    block_k: int
    block_i: int
    num_warps: int
    num_stages: int = 1


ROUTE_SUMS = RouteSums(
    8, 128, 1024, 4
)  # 9 programs for 4 experts of 1152 channels, 8 images in flight in each


def route_config(width: int) -> RouteConfig:
    return next(row for row in ROUTE if width <= row.width)


# ---- grouped_outer and the column sums of the backward ----


@dataclass(frozen=True)
class OuterConfig:
    """One program computes ``block_n`` x ``block_k`` of one expert's weight gradient, ``block_t`` tokens at a time.

    Attributes:
        group: blocks of rows that are visited with all blocks of columns before the next ones, for L2.
        num_stages: pipeline buffers of the main loop.
        tma: operands come through tensor descriptors instead of pointers.
    """

    block_n: int
    block_k: int
    block_t: int
    group: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernel's arguments of these names."""
        return {
            "GROUP": self.group,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "BLOCK_T": self.block_t,
            "TMA": self.tma,
        }


# None of these rows has been measured on a GPU yet. At T = 729, steps of 64 tokens issue 768, steps of 32 issue 736;
# 128 divides 1152, 3456 and 3584, and wastes 1.1 % at 4304. The sum runs along the outer axis of both operands, which
# wgmma and tcgen05 read so in half precision only: float32 is transposed on its way through cp.async, as TMA cannot.
OUTER_ROWS = {
    "half": (  # float16, bfloat16: 96 KB of buffers, which every NVIDIA chip has
        # sm_90, sm_100, sm_120 where rows are multiples of 16 bytes; two programs fit on a multiprocessor of sm_90
        OuterConfig(128, 128, 64, group=8, num_warps=8, num_stages=3, tma=True),
        # sm_80, sm_86, sm_89; the others with other rows
        OuterConfig(128, 128, 64, group=8, num_warps=8, num_stages=3),
    ),
    "tf32": (  # float32, torch.set_float32_matmul_precision("high"); 96 KB
        OuterConfig(128, 128, 32, group=8, num_warps=8, num_stages=3),
    ),
    "exact": (  # float32, "highest": three tf32 products, whose operands take the registers
        OuterConfig(128, 64, 32, group=8, num_warps=8, num_stages=3),
    ),
    "amd": (  # any dtype, in 64 KB
        OuterConfig(128, 128, 32, group=8, num_warps=8, num_stages=2),
    ),
}


def outer_rows(on: Chip, dtype: torch.dtype, describable: Callable[[], bool]) -> list[OuterConfig]:
    """The rows that serve a chip and a dtype, the default first; arguments as of ``gemm_rows``."""
    tma = uses_tma(on, describable)
    return [row for row in OUTER_ROWS[table(on, dtype)] if row.tma <= tma]


@dataclass(frozen=True)
class SumConfig:
    """A program adds rows of ``columns`` columns, ``rows`` at a time.

    Attributes:
        chunk: rows one program adds in all; 0 for all there are. A constant, so that sums never depend on the batch.
    """

    rows: int
    columns: int
    chunk: int
    num_warps: int
    num_stages: int = 1


# Reads dy and pre, writes dz: 16 values a thread at a time (32 spill in float32 on sm_80); 12 chunks a tile at T = 729,
# so that a single tile of 4304 columns makes 408 programs. In half precision the partial sums are 3 % of what dz takes.
ACTIVATION_BACKWARD = SumConfig(rows=16, columns=128, chunk=64, num_warps=4)
# 64 partial sums an expert at a time: 64 tiles of 729 tokens take 12 steps, and 4304 columns 135 programs an expert.
SUM_BY_EXPERT = SumConfig(rows=64, columns=32, chunk=0, num_warps=4)


# ---- route_grouped_linear ----


@dataclass(frozen=True)
class TicketConfig:
    """The rows of the three kernels whose work is done in one launch, all with the warps of the GEMM.

    Attributes:
        norm_rows: tokens a program normalises.
    """

    gemm: GemmConfig
    norm: LayerNormBlock
    pool: RouteConfig
    norm_rows: int

    @property
    def num_warps(self) -> int:
        return self.gemm.num_warps

    @property
    def num_stages(self) -> int:
        return self.gemm.num_stages

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's arguments of these names."""
        return {
            "POOL_ROWS": self.pool.rows,
            "BLOCK_D": self.pool.block_d,
            "NORM_ROWS": self.norm_rows,
            "ROWS": self.norm.ROWS,
            "LANES": self.norm.LANES,
            "VECTOR": self.norm.VECTOR,
            "GROUP": self.gemm.group,
            "BLOCK_M": self.gemm.block_m,
            "BLOCK_N": self.gemm.block_n,
            "BLOCK_K": self.gemm.block_k,
        }


# As many as are pooled at once: 23 programs a tile of 729 tokens, so that 6 tiles fill an H100 with them.
TICKET_NORM_ROWS = 32


def tickets(on: Chip, dtype: torch.dtype, width: int) -> TicketConfig | None:
    """The config for features of ``width`` numbers; None where three launches serve them.

    Those serve features so wide that the router's vectors would not stay in the registers of the GEMM's warps, and so
    narrow that a program normalises more rows at once than a block of the GEMM has.
    """
    gemm = gemm_rows(on, dtype, lambda: False)[0]
    norm = layer_norm(width, dtype.itemsize, num_warps=gemm.num_warps)
    norm_rows = max(TICKET_NORM_ROWS, norm.ROWS)
    if width > ROUTE[0].width or norm_rows > gemm.block_m:
        return None
    return TicketConfig(gemm, norm, route_config(width), norm_rows)
