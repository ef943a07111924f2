"""``mixpert kernels --backend cuda``: what the compiled kernels take, read from their machine code."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from .tables import print_table, write_page

COLUMNS = {
    "kernel": "kernel",
    "chip": "chip",
    "threads": "threads",
    "registers": "registers",
    "stack_bytes": "stack",
    "spill_instructions": "spills",
    "shared_bytes": "shared",
    "blocks_per_multiprocessor": "blocks",
    "matrix_instruction": "product",
    "operands": "operands",
    "turn": "a turn: mma, ldmatrix, cp.async, other",
    "step": "a k-step",
    "other_per_mma": "a product",
}
COUNTS = ("mma", "ldmatrix", "cp_async", "other")


def run(args: argparse.Namespace) -> None:
    """Read and print, or write into the documentation."""
    if args.segment or args.defaults:
        raise ValueError("kernels: --segment and --defaults are for --backend triton")
    rows = collect(args.objects, args.chip, args.kernel)
    if args.write:
        write_page(args.write, "kernels_cuda.json", rows, {"cuda": table(rows)})
    else:
        print(json.dumps(rows, indent=1) if args.json else table(rows), end="")


def collect(
    objects: Path | None, chips: list[str] | None = None, kernels: list[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each kernel and chip.

    Args:
        objects: a folder of objects; None: the extension that is installed.
        chips: only these; sm_90 is sm_90a.
        kernels: only these.

    Raises:
        ValueError: a kernel has no such name.
        RuntimeError: there are no objects, or no extension.
    """
    from mixpert_kernels.backends.cuda import _resources

    wanted = {"sm_90a" if chip == "sm_90" else chip for chip in chips} if chips else None
    rows = _resources.rows(_files(objects), wanted)
    known = sorted({row["kernel"] for row in rows})
    for kernel in kernels or ():
        if kernel not in known:
            raise ValueError(f"kernels: kernel must be one of {', '.join(known)}, got {kernel}")
    return [row for row in rows if not kernels or row["kernel"] in kernels]


def _files(objects: Path | None) -> list[Path]:
    if objects is None:
        from mixpert_kernels import _build_info

        info = _build_info.build_info()
        if not info.extension:
            raise RuntimeError(f"kernels: the extension is not built: {info.reason}")
        return sorted(_build_info.BUILD_FILE.parent.glob("_C*.so"))
    files = sorted((*objects.glob("*.o"), *objects.glob("*.cubin")))
    if not files:
        raise RuntimeError(f"kernels: there are no objects in {objects}")
    return files


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    rows = [row | _counts(row) for row in rows]
    cells = [["-" if row[key] is None else str(row[key]) for key in COLUMNS] for row in rows]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_table([list(COLUMNS.values()), *cells])
    return shown.getvalue()


def _counts(row: dict[str, Any]) -> dict[str, str | None]:
    """What the main loop is made of, a turn and a step along the summed dimension: "192:48:24:31", "32:8:4:5.2"."""
    if row["mma"] is None:
        return {"turn": None, "step": None}
    counts = [row[key] for key in COUNTS]
    steps = (f"{count / row['k_steps']:.1f}".removesuffix(".0") for count in counts)
    return {"turn": ":".join(map(str, counts)), "step": ":".join(steps)}
