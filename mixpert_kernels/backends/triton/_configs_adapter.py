"""The rows of grouped_adapter, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from mixpert_kernels.backends.chips import Chip

from ._configs_gemm import table


@dataclass(frozen=True)
class AdapterConfig:
    """One program computes ``block_m`` tokens: their hidden numbers, then ``span`` columns of the output.

    Attributes:
        hidden: the row serves H up to here.
        block_k: features of the first product's sum at a time.
        block_n: columns of the output at a time.
        span: columns of the output a program computes; a wider output is shared by several, each of which computes
            the hidden numbers again.
        num_stages: pipeline buffers of either loop.
    """

    hidden: int
    block_m: int
    block_k: int
    block_n: int
    span: int
    num_warps: int
    num_stages: int


# None of these rows has been measured on a GPU yet. The op moves memory: at H = 64 an output takes 43 products for each
# byte that is read or written, of the 295 that an H100 could do in the time. So 64 rows a program, for many programs,
# and 1024 columns: at D = 4096 four programs share 64 rows. The products are 2.5 times as many then, still less than
# memory has time for, and 8 samples of 600 tokens make 320 programs; one token (generation) makes 4, of which each
# reads its adapter's down projection and a quarter of the other. Without spills up to H = 64; up to 128 a few in
# float32 on sm_100 and sm_120.
ADAPTER = {
    "half": (  # float16, bfloat16
        AdapterConfig(64, 64, 64, 64, span=1024, num_warps=4, num_stages=4),
        AdapterConfig(128, 64, 64, 64, span=1024, num_warps=8, num_stages=4),
    ),
    "tf32": (  # float32, torch.set_float32_matmul_precision("high")
        AdapterConfig(64, 64, 32, 32, span=1024, num_warps=4, num_stages=4),
        AdapterConfig(128, 64, 32, 32, span=1024, num_warps=8, num_stages=4),
    ),
    "exact": (  # float32, "highest": three tf32 products, whose operands take the registers
        AdapterConfig(64, 64, 16, 32, span=1024, num_warps=8, num_stages=3),
        AdapterConfig(128, 64, 16, 16, span=1024, num_warps=8, num_stages=3),
    ),
    "amd": (  # any dtype, in 64 KB
        AdapterConfig(128, 64, 32, 64, span=1024, num_warps=4, num_stages=2),
    ),
}


@dataclass(frozen=True)
class InnerConfig:
    """A program adds what a tile's blocks have, ``rows`` blocks at a time, and ``columns`` columns at a time."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1


INNER = InnerConfig(rows=64, columns=512, num_warps=4)  # 1024 columns spill in float32 on sm_80


def adapter(on: Chip, dtype: torch.dtype, hidden: int) -> AdapterConfig:
    return next(row for row in ADAPTER[table(on, dtype)] if hidden <= row.hidden)


def padded(hidden: int) -> int:
    """H as the kernels compute it: a power of two that a product can have."""
    return max(16, triton.next_power_of_2(hidden))
