"""``mixpert check``: every op of every backend against float64 on the machine at hand; a table for a bug report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .tables import print_table

HALVES = ("float16", "bfloat16")
TIMEOUT = 600  # seconds; a kernel that hangs is a failure too
HEAD = ("op", "pass", "backend", "dtype", "where", "quantity", "error", "allowed", "result")


class Job(NamedTuple):
    """What one process checks."""

    place: str
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        module = "mixpert_kernels.cli.check_worker"
        lists = (",".join(self.dtypes), ",".join(self.ops))
        return [sys.executable, "-m", module, self.place, *lists]

    @property
    def environment(self) -> dict[str, str]:
        interpreted = {"interpreter": "1", "cpu": os.environ.get("TRITON_INTERPRET", "0")}
        return {"TRITON_INTERPRET": interpreted.get(self.place, "0"), "OMP_NUM_THREADS": "1"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="every kernel against float64, as a table for a bug report",
        description="Run each op, forward and backward, by each backend that this machine can run, in each dtype it "
        "serves, on small odd shapes, and compare with the reference in float64. A result may be twice as far from it "
        "as plain PyTorch's own in the same dtype, plus one rounding. Without a GPU, Triton's kernels run in its "
        "interpreter and, in a source checkout, in an emulator of compiled kernels (bfloat16 alone, unless --full). "
        "With --full, those of csrc/ are compiled and run there too. Exit status 1 if a row failed.",
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument(
        "--full", action="store_true", help="the emulator in every dtype: minutes instead of one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the checks in processes of their own and print.

    Raises:
        RuntimeError: a row failed.
    """
    from . import info

    start = time.monotonic()
    jobs, rows = plan(args.op, args.full)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        rows = [row for part in pool.map(_rows, jobs) for row in part] + rows
    rows.sort(key=lambda row: (row["op"], row["backend"], row["where"]))
    facts = info.collect()
    seconds = round(time.monotonic() - start, 1)
    failed = sum(row["status"] == "FAILED" for row in rows)
    if args.json:
        report = {name: facts[name] for name in ("versions", "machine")}
        print(json.dumps(report | {"seconds": seconds, "failed": failed, "rows": rows}, indent=1))
    else:
        _print(facts, rows, seconds)
    if failed:
        raise RuntimeError(f"{failed} of {len(rows)} checks failed")


def plan(names: Sequence[str] | None, full: bool) -> tuple[list[Job], list[dict[str, Any]]]:
    """What to run here, the longest first; and rows that say why the rest is not."""
    import torch

    from .check_worker import EMULATOR, names_of_ops

    every, ops = ("float32", *HALVES), tuple(names or names_of_ops())
    if unknown := set(ops) - set(names_of_ops()):
        raise ValueError(f"op must be one of {', '.join(names_of_ops())}, got {unknown.pop()}")
    cpu = Job("cpu", every, ops)
    if torch.cuda.is_available():
        return [*(Job("cuda", (dtype,), ops) for dtype in every), cpu], []
    chips, jobs, rows = ("sm_80", "sm_90"), [cpu], []
    absent = None
    if not EMULATOR.is_file():
        absent = "a source checkout has the emulator, an installed package does not"
    if importlib.util.find_spec("triton") is None:
        rows.append(_line("triton", "all", "not run", "triton is not installed"))
    else:
        jobs.insert(0, Job("interpreter", every, ops))
        if absent:
            rows.append(_line("triton", "emulator", "not run", absent))
        else:
            dtypes = every if full else ("bfloat16",)
            jobs = [*(Job(chip, dtypes, ops) for chip in chips), *jobs]
    no_cuda = absent or (None if shutil.which("nvcc") else "nvcc is not on PATH")
    if no_cuda or not full:
        reason = no_cuda or "--full compiles and runs it: minutes"
        rows.append(_line("cuda", "emulator", "not run", reason))
    else:
        jobs = [Job(f"csrc {chip}", (dtype,), ops) for dtype in every for chip in chips] + jobs
    return jobs, rows


def _line(backend: str, where: str, status: str, reason: str) -> dict[str, Any]:
    """A row that speaks of every op."""
    from .check_worker import Row

    row = Row("all", "both", backend, "all", where, status, reason=reason)
    return _named(dataclasses.asdict(row))


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {"pass" if name == "direction" else name: value for name, value in row.items()}


def _rows(job: Job) -> list[dict[str, Any]]:
    """Run one job in a fresh interpreter; a crash or a hang is a failed row."""
    import mixpert_kernels

    root = os.path.dirname(os.path.dirname(os.path.abspath(mixpert_kernels.__file__)))
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **job.environment, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        child = subprocess.run(
            job.command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return [_line("all", job.place, "FAILED", f"did not end within {TIMEOUT} s")]
    if child.returncode != 0:
        tail = child.stderr.strip().splitlines()[-1:] or ["no message"]
        reason = f"the process ended with status {child.returncode}: {tail[0]}"
        return [_line("all", job.place, "FAILED", reason)]
    return [_named(row) for row in json.loads(child.stdout.splitlines()[-1])]


def _print(facts: dict[str, Any], rows: list[dict[str, Any]], seconds: float) -> None:
    known = {**facts["versions"], **facts["machine"]}
    print_table([[name, str(value)] for name, value in known.items()])
    print()
    lines = [list(HEAD)]
    for row in rows:
        numbers = ["" if row[key] is None else f"{row[key]:.2e}" for key in ("error", "allowed")]
        words = [row[key] for key in HEAD[:6]]
        result = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        lines.append([*words, *numbers, result])
    print_table(lines)
    counts = {word: sum(row["status"] == word for row in rows) for word in ("ok", "FAILED")}
    print(f"\n{counts['ok']} ok, {counts['FAILED']} FAILED, {seconds} s")
    print("error, allowed: of the quantity nearest to its bound, against float64; allowed is twice")
    print("plain PyTorch's own error in the same dtype, plus one rounding of the largest value")
