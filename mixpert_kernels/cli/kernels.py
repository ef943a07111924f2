"""``mixpert kernels``: what the kernels take on each chip; no GPU is needed.

Triton's are compiled here and now, those of csrc/ read from the extension or from objects (cuda_kernels.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import cuda_kernels
from .tables import print_table, write_page

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
COLUMNS = {
    "kernel": "kernel",
    "config": "config",
    "chip": "chip",
    "registers": "registers",
    "stack_bytes": "stack",
    "spill_instructions": "spills",
    "shared_bytes": "shared",
    "pipeline_buffers": "buffers",
    "loop_instructions": "a k-step",
    "blocks_per_multiprocessor": "blocks",
    "matrix_instruction": "matrix",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "kernels",
        help="what the kernels take on each chip",
        description="Triton: compile each kernel for each chip, at the sizes of the reference model; print registers "
        "and stack bytes a thread; spills; shared memory and pipeline buffers a program; instructions a step of the "
        "main loop; programs a multiprocessor runs at once; the matrix instruction. Then what the expert segment (two "
        "layers and the projector, 8 tiles, 4 experts) costs. CUDA: read the same from the compiled extension or from "
        "objects, and of what a turn of the main loop is made.",
    )
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument(
        "--objects",
        type=Path,
        metavar="DIR",
        help="cuda: read the objects there, not the extension",
    )
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this one; repeatable")
    parser.add_argument(
        "--kernel", action="append", metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument(
        "--defaults", action="store_true", help="without the configs that only autotuning takes"
    )
    parser.add_argument(
        "--segment", action="store_true", help="only the costs of the expert segment"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DOCS",
        help="write all into kernels.json and kernels.md there",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compile in processes of their own and print."""
    if args.backend == "cuda":
        cuda_kernels.run(args)
        return
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("kernels: triton is not installed")
    chips = tuple(dict.fromkeys(args.chip or CHIPS))
    with (
        _environment(TRITON_INTERPRET="0", OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _prepare) as pool,
    ):
        rows = [] if args.segment else collect(pool, chips, args.kernel, args.defaults)
        segment = [row for part in pool.map(_segment, chips) for row in part]
    if args.write:
        write(args.write, rows, segment)
    elif args.json:
        print(json.dumps(segment if args.segment else rows, indent=1))
    else:
        if rows:
            print_rows(rows)
            print()
        print_segment(segment)


def write(docs: Path, rows: list[dict[str, Any]], segment: list[dict[str, Any]]) -> None:
    """Write the rows to kernels.json and the tables into kernels.md, between its marks."""
    write_page(docs, "kernels.json", rows, tables(rows, segment))


def tables(rows: list[dict[str, Any]], segment: list[dict[str, Any]]) -> dict[str, str]:
    """The text of the tables of kernels.md: the configs taken without autotuning, and the segment."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_rows([row for row in rows if row["default"]])
    with contextlib.redirect_stdout(io.StringIO()) as costs:
        print_segment(segment)
    return {"kernels": shown.getvalue(), "segment": costs.getvalue()}


def collect(
    pool: ProcessPoolExecutor, chips: tuple[str, ...], kernels: list[str] | None, defaults: bool
) -> list[dict[str, Any]]:
    """A row for each kernel, config and chip.

    Raises:
        ValueError: a kernel has no such name.
    """
    from tqdm import tqdm

    names = dict(zip(chips, pool.map(_names, chips, [defaults] * len(chips)), strict=True))
    known = {name for listed in names.values() for name in listed}
    for kernel in kernels or []:
        if kernel not in known:
            known_names = ", ".join(sorted(known))
            raise ValueError(f"kernels: kernel must be one of {known_names}, got {kernel}")
    tasks = [
        pool.submit(_row, chip, index, defaults)
        for chip, listed in names.items()
        for index, name in enumerate(listed)
        if not kernels or name in kernels
    ]
    return [task.result() for task in tqdm(tasks, desc="compiling", leave=False, delay=1)]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables for the processes started within.

    They are read when Triton and OpenMP are imported, which may be as early as a process looks for ``_prepare``.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepare() -> None:
    warnings.simplefilter("ignore")


@functools.cache
def _launches(chip: str, defaults: bool) -> list[Any]:
    from mixpert_kernels.backends.triton import _catalogue

    return _catalogue.launches(_catalogue.CHIPS[chip], every_config=not defaults)


def _names(chip: str, defaults: bool) -> list[str]:
    return [launch.kernel_name for launch in _launches(chip, defaults)]


def _row(chip: str, index: int, defaults: bool) -> dict[str, Any]:
    from mixpert_kernels.backends.triton import _catalogue, _costs

    return _costs.row(_launches(chip, defaults)[index], _catalogue.CHIPS[chip])


def _segment(chip: str) -> list[dict[str, Any]]:
    from mixpert_kernels.backends.triton import _catalogue, _costs

    return _costs.segment_costs(_catalogue.CHIPS[chip])


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a row for each kernel, config and chip."""
    table = [list(COLUMNS.values())]
    table += [["-" if row[key] is None else str(row[key]) for key in COLUMNS] for row in rows]
    print_table(table)


def print_segment(segment: list[dict[str, Any]]) -> None:
    """Print the sum for each chip, then the first chip's launches."""
    table = [["expert segment", "launches", "GFLOP", "issued", "MB needed", "asked"]]
    for chip in dict.fromkeys(row["chip"] for row in segment):
        launches = [row for row in segment if row["chip"] == chip]
        table.append([chip, f"{len(launches)} + 2 attention", *_shares(launches)])
    for row in segment:
        if row["chip"] == segment[0]["chip"]:
            table.append([f"  {row['call']}", row["kernel"], *_shares([row])])
    print_table(table)


def _shares(launches: list[dict[str, Any]]) -> list[str]:
    """Useful FLOPs and needed bytes, and how many times as much is issued and asked for."""
    cells = []
    for useful, spent, unit in (
        ("useful_flops", "issued_flops", 1e9),
        ("needed_bytes", "asked_bytes", 1e6),
    ):
        first, second = (sum(row[key] for row in launches) for key in (useful, spent))
        cells += [f"{first / unit:.1f}", f"{second / first:.3f}x" if first else "-"]
    return cells
