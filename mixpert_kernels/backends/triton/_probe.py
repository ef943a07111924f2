"""What Triton's interpreter can do here, found out by trying."""

from __future__ import annotations

import functools

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(count_ptr, out_ptr):
    # out = count, by a loop over a number that is only known on the device
    total = 0
    for _ in range(0, tl.load(count_ptr)):
        total += 1
    tl.store(out_ptr, total)


@functools.cache
def why_not_interpreted() -> str | None:
    """Triton 3.6 and older read a loop's bound in a way that numpy 2.4 and newer refuse."""
    count, out = torch.full((1,), 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](count, out)  # not through _launch: it is none of what tests count
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:80]
        return f"Triton {triton.__version__} can't interpret loops with numpy {numpy.__version__}: {reason}"
    return None
