"""Block sizes of MoME's Triton kernels, with the reason for each; as in ``_configs``, none depends on the batch."""

from __future__ import annotations

from dataclasses import dataclass

from ._configs import vector

# ---- adaptive_pool ----


@dataclass(frozen=True)
class PoolBlock:
    """A program averages ROWS results of LANES channels, COLUMNS patches of a row of the grid at a time.

    Sums run patch by patch whatever the block is, so no bit depends on it.
    """

    ROWS: int
    LANES: int
    COLUMNS: int
    VECTOR: int
    num_warps: int = 4
    num_stages: int = 1


def pool(channels: int, itemsize: int, *, backward: bool = False) -> PoolBlock:
    """One load of 16 bytes a thread and patch: a warp has the same patch of 256 channels in half precision.

    Not measured on a GPU yet. Loads of COLUMNS patches are in flight at once: a row of a bin has 2 where 32 patches are
    pooled to 16, and 3 or 4 where 40 to 50 are; a patch is in 1 bin or in 2.
    """
    numbers = vector(channels, itemsize)
    lanes = min(1 << (channels - 1).bit_length(), 32 * numbers)
    return PoolBlock(4 * 32 * numbers // lanes, lanes, 2 if backward else 4, numbers)


# ---- mix_streams ----


@dataclass(frozen=True)
class MixBlock:
    """A program mixes BLOCK adjacent numbers of an image, or adds up CHUNK of them, BLOCK at a time.

    Attributes:
        CHUNK: 0 where nothing is added up. A constant, so that sums never depend on the batch.
    """

    BLOCK: int
    CHUNK: int = 0
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class MixLogits:
    """A program adds an image's parts, PARTS at a time."""

    PARTS: int
    num_warps: int = 1
    num_stages: int = 1


MIX_LOGITS = MixLogits(32)  # 128 chunks of 256 tokens 4096 wide take 4 steps


def mix(itemsize: int, *, backward: bool = False) -> MixBlock:
    """Two loads of 16 bytes a thread and stream, one in backward, where each stream has a sum of its own as well.

    Not measured on a GPU yet. Of 256 tokens 4096 wide a program adds up 1 of 128 chunks, so that a single image fills a
    GPU; their parts are 0.1 % of what is read.
    """
    numbers = 128 * 16 // itemsize
    return MixBlock(numbers, 8192) if backward else MixBlock(2 * numbers)
