"""Which compiled kernels serve a call, with the reason for each; tile sizes stand in csrc/ and are read from there.

No choice depends on the number of tiles or of tokens where the bits of a result could: kernels between which such a
choice is made give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mixpert_kernels.backends.chips import chip  # noqa: F401

# How kernels are called after their element type.
SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

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
