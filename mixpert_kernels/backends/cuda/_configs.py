"""Which compiled kernels serve a call, with the reason for each; tile sizes stand in csrc/ and are read from there.

No choice depends on the number of tiles or of tokens where the bits of a result could: kernels between which such a
choice is made give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixpert_kernels.backends.chips import chip

from . import _launch

# How kernels are called after their element type.
SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Of outputs: a kernel counts them, a grid at a time, in 32 bits.
MAX_BLOCKS = 2**30

_forced: Any = None


@contextlib.contextmanager
def forced(choice: Any) -> Iterator[None]:
    """Within, a product takes the kernels of this name ("large", "small", "wgmma"), for tests and for tuning."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def choice() -> Any:
    """What ``forced`` asks for; None where the host is to choose."""
    return _forced


def of_size(name: str, device: torch.device, blocks: Callable[[dict[str, int]], int]) -> str:
    """``<name>_large``, or ``<name>_small`` where large blocks would not be one for every multiprocessor.

    Both give the same bits, so that this may depend on the batch.

    Args:
        name: op and element type.
        device: of the call.
        blocks: how many a kernel of these constants has.
    """
    kernels = _launch.kernels()
    large, small = f"{name}_large", f"{name}_small"
    if _forced is not None and f"{name}_{_forced}" in kernels:
        return f"{name}_{_forced}"
    few = blocks(kernels[large].constants) < chip(device).multiprocessors
    return small if few and small in kernels else large


def persistent(kernel: str, device: torch.device, blocks: int) -> int:
    """The grid of a kernel whose thread blocks take one block of outputs after another: what the chip holds at once."""
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{kernel}: at most {MAX_BLOCKS} blocks of outputs, got {blocks}")
    held = _launch.resident_blocks(kernel, device) * chip(device).multiprocessors
    return min(blocks, max(held, 1))
