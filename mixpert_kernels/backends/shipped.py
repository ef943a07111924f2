"""Which backend ``auto`` tries first where nothing was measured on the device at hand; each row says what it rests on.

On a GPU one backend for all ops of a chip and dtype, so that a fused op stays bitwise equal to the ops it replaces.
``mixpert tune`` puts measurements in the place of these rows.
"""

from __future__ import annotations

from typing import NamedTuple

ANY = "any"


class Shipped(NamedTuple):
    """One row.

    Attributes:
        chip: ``cpu``, or a name as of ``backends.chips.Chip``, such as ``sm_90``; ``sm_`` stands for every NVIDIA
            chip that has no row of its own, ``gfx`` for every AMD one.
        op: its name, or ``any``.
        dtype: such as ``float32``, or ``any``.
        backend: one of ``backends.BACKENDS``.
        rests_on: ``measured on ...``, or ``not measured yet: ...`` with the reason for the guess.
    """

    chip: str
    op: str
    dtype: str
    backend: str
    rests_on: str


_UNTRIED = "has been emulated for every chip and run on none, while Triton's compiler is in use on this one"
_POOLED = "measured on an Intel Xeon (one thread): 0.18 to 0.25 of the time of a loop over adaptive_avg_pool2d"
_MIXED = "measured on an Intel Xeon (one thread): 0.2 of the reference's time, 0.5 in bfloat16"
_TCGEN05 = "not measured yet: Triton reaches tcgen05, the CUDA backend mma.sync alone"
_BAGS = "measured on an Intel Xeon (one thread): 0.38 to 0.44 of a loop over grid_sample, 0.29 to 0.37 with backward"
# The first row that fits decides.
ROWS = (
    Shipped("cpu", "route", ANY, "reference", "the only one there is for a CPU"),
    Shipped("cpu", "deform_attn", "float32", "cpu", _BAGS),
    Shipped("cpu", "adaptive_pool", ANY, "cpu", _POOLED),
    Shipped("cpu", "mix_streams", ANY, "cpu", _MIXED),
    Shipped("cpu", "grouped_adapter", "float32", "cpu", "measured on an Intel Xeon, 0.20 to 0.67 of reference"),
    Shipped("cpu", ANY, "float32", "cpu", "measured on an AMD EPYC (2 cores, AVX-512), the segment as a whole: README"),
    Shipped("cpu", ANY, ANY, "cpu", "not measured yet: should save the passes over memory that it saves in float32"),
    Shipped("sm_100", ANY, ANY, "triton", _TCGEN05),
    Shipped("sm_103", ANY, ANY, "triton", _TCGEN05),
    Shipped("sm_", ANY, "float32", "triton", "not measured yet: may use TF32 where PyTorch is told to, CUDA never"),
    Shipped("sm_", ANY, ANY, "triton", f"not measured yet: the CUDA backend {_UNTRIED}"),
    Shipped("gfx", ANY, ANY, "triton", "not measured yet: the only backend with kernels for AMD"),
)  # fmt: skip


def shipped(chip: str, op: str, dtype: str) -> Shipped | None:
    """Return the row for a chip, op and dtype; None if there is none.

    Example:
        >>> shipped("sm_90", "route", "bfloat16").backend
        'triton'
    """
    for row in ROWS:
        fits = chip.startswith(row.chip) if row.chip in ("sm_", "gfx") else chip == row.chip
        if fits and row.op in (ANY, op) and row.dtype in (ANY, dtype):
            return row
    return None
