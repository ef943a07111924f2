"""What a choice of config may depend on: the chip and two environment variables, never the batch."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

KB = 1024


@dataclass(frozen=True)
class Chip:
    """What a choice of config may depend on.

    Attributes:
        name: ``sm_90``, ``gfx942``.
        arch: 80, 86, 89, 90, 100, 120 on NVIDIA; 0 on AMD.
        shared_bytes: shared memory a block may have.
        multiprocessors: how many there are; 1 where nothing is known.
    """

    name: str
    arch: int
    shared_bytes: int
    multiprocessors: int = 1

    @property
    def has_tma(self) -> bool:
        return self.arch >= 90


SHARED_BYTES = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
AMD_SHARED_BYTES = 64 * KB
REGISTERS = 64 * KB  # of a multiprocessor; a warp takes them by 256
# Of a multiprocessor: shared memory (a block takes 1 KB more than it asks for), warps, blocks.
LIMITS = {
    80: (164 * KB, 64, 32),
    86: (100 * KB, 48, 16),
    89: (100 * KB, 48, 24),
    90: (228 * KB, 64, 32),
    100: (228 * KB, 64, 32),
    120: (100 * KB, 48, 24),
}


def nvidia(arch: int, multiprocessors: int = 1) -> Chip:
    """The chip of compute capability ``arch / 10``; an unknown one has the shared memory of the smallest."""
    shared = SHARED_BYTES.get(arch, min(SHARED_BYTES.values()))
    return Chip(f"sm_{arch}", arch, shared, multiprocessors)


def blocks_a_multiprocessor(arch: int, registers: int, shared: int, warps: int) -> int | None:
    """How many blocks run on a multiprocessor at once; None where it is not known.

    Args:
        arch: of the chip, 80 for sm_80.
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
    """
    if arch not in LIMITS:
        return None
    shared_bytes, most_warps, most = LIMITS[arch]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    return min(by_registers, shared_bytes // (shared + KB), most_warps // warps, most)


def chip(device: torch.device) -> Chip:
    """The chip behind a device; for a CPU, where kernels are interpreted, sm_80."""
    return (
        nvidia(80)
        if device.type != "cuda"
        else _of_index(torch.cuda._utils._get_device_index(device, True))
    )


@functools.cache
def _of_index(index: int) -> Chip:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = facts.gcnArchName.split(":")[0]
        return Chip(name, 0, AMD_SHARED_BYTES, facts.multi_processor_count)
    return nvidia(10 * facts.major + facts.minor, facts.multi_processor_count)


def tma_allowed() -> bool:
    """``MIXPERT_TMA=0`` turns tensor descriptors off."""
    return os.environ.get("MIXPERT_TMA", "1") != "0"


def autotuning() -> bool:
    """``MIXPERT_AUTOTUNE=1`` times the rows on the first call of each shape of layer, instead of taking the first."""
    return os.environ.get("MIXPERT_AUTOTUNE") == "1"
