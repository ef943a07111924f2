"""The rows of the grouped GEMMs: grouped_linear forward, its dX and what shares their code."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from mixpert_kernels.backends.chips import Chip, autotuning, tma_allowed


@dataclass(frozen=True)
class GemmConfig:
    """One program computes blocks of ``block_m`` tokens x ``block_n`` columns, ``block_k`` of the sum at a time.

    Attributes:
        group: row blocks that are visited with all columns before the next ones, for L2.
        num_stages: pipeline buffers of the main loop.
        tma: operands come through tensor descriptors instead of pointers.
        programs_per_multiprocessor: 0 for one program a block; else so many programs share all blocks.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    tma: bool = False
    programs_per_multiprocessor: int = 0

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernel's arguments of these names."""
        return {
            "GROUP": self.group,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "TMA": self.tma,
            "PERSISTENT": self.programs_per_multiprocessor > 0,
        }

    def shared_bytes(self, itemsize: int, on: Chip) -> int:
        """What the pipeline's buffers take: a stage less on chips whose product reads registers, not shared memory."""
        buffers = self.num_stages - (on.arch not in (90, 100))
        return buffers * (self.block_m + self.block_n) * self.block_k * itemsize

    def programs(self, blocks: int, on: Chip) -> int:
        """The grid for so many blocks."""
        most = self.programs_per_multiprocessor * on.multiprocessors
        return min(blocks, most) if most else blocks


# None of these rows has been measured on a GPU yet. All keep BLOCK_M and BLOCK_N at 128 where registers allow: of
# T = 729 tokens 94.9 % of 768 rows are useful, 128 divides N = 1152, 3456 and 3584, and wastes 1.1 % at 4304.
GEMM_ROWS = {
    "half": (  # float16, bfloat16
        # sm_90, sm_100, sm_120 where rows are multiples of 16 bytes: TMA fills the tails, no thread computes addresses
        GemmConfig(128, 128, 64, group=8, num_warps=8, num_stages=4, tma=True),
        # the same, for autotuning to try: the grid fills the chip once, which saves the start of each later block.
        # Not on sm_100, where the loop over blocks with three weights spills.
        GemmConfig(
            128,
            128,
            64,
            group=8,
            num_warps=8,
            num_stages=4,
            tma=True,
            programs_per_multiprocessor=1,
        ),
        # sm_80, sm_86, sm_89 (96 of 99 KB); the others with rows of other sizes, or with MIXPERT_TMA=0
        GemmConfig(128, 128, 64, group=8, num_warps=8, num_stages=4),
    ),
    "tf32": (  # float32, torch.set_float32_matmul_precision("high"); the same bytes, so the same chips
        GemmConfig(128, 128, 32, group=8, num_warps=8, num_stages=4, tma=True),
        GemmConfig(128, 128, 32, group=8, num_warps=8, num_stages=4),
    ),
    "exact": (  # float32, "highest", PyTorch's default: three tf32 products, whose operands take the registers
        GemmConfig(128, 64, 32, group=8, num_warps=8, num_stages=3),
    ),
    "amd": (  # any dtype, in 64 KB
        GemmConfig(128, 128, 32, group=8, num_warps=4, num_stages=2),
    ),
}


def gemm_precision(on: Chip, dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 as PyTorch's own matrix products would."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if on.arch else "ieee"


def table(on: Chip, dtype: torch.dtype) -> str:
    """Which table of a product's rows serves a chip and a dtype."""
    if not on.arch:
        return "amd"
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if gemm_precision(on, dtype) == "tf32" else "exact"


def uses_tma(on: Chip, describable: Callable[[], bool]) -> bool:
    """Whether rows with tensor descriptors may serve a call."""
    return on.has_tma and tma_allowed() and describable()


def gemm_rows(on: Chip, dtype: torch.dtype, describable: Callable[[], bool]) -> list[GemmConfig]:
    """The rows that serve a chip and a dtype, the default first.

    Args:
        on: the chip.
        dtype: of the features.
        describable: tells whether tensor descriptors can describe the operands; asked where the chip has them.
    """
    tma = uses_tma(on, describable)
    return [
        row
        for row in GEMM_ROWS[table(on, dtype)]
        if row.shared_bytes(dtype.itemsize, on) <= on.shared_bytes
        and row.tma <= tma
        and not (row.programs_per_multiprocessor and on.arch == 100)
    ]


_fastest: dict[Hashable, GemmConfig] = {}


def fastest(key: Hashable, rows: list[GemmConfig], run: Callable[[GemmConfig], None]) -> GemmConfig:
    """The first row; when autotuning on a GPU, the one that ran fastest the first time ``key`` was seen.

    Args:
        key: kernel, sizes of the layer, dtype and chip; never the number of tiles or tokens.
        rows: at least one.
        run: launches with a row; may be called many times.
    """
    if len(rows) == 1 or not autotuning() or not torch.cuda.is_available():
        return rows[0]
    if key not in _fastest and not torch.cuda.is_current_stream_capturing():
        from triton.testing import do_bench

        _fastest[key] = min(rows, key=lambda row: do_bench(lambda: run(row)))
    return _fastest.get(key, rows[0])
