"""Apply each mutant to a copy of the sources and show that the tests it names fail.

    python tests/mutants/run.py                 # all
    python tests/mutants/run.py --sample 4      # every so-manieth, so that four run
    python tests/mutants/run.py tma-off-by-one  # by name
    python tests/mutants/run.py --list

The sources at hand are not touched. Exit status 1 if a mutant survives, no longer applies, or if a test it names fails
without it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from catalogue import MUTANTS
from mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mixpert_kernels", "csrc", "tests", "benchmarks", "docs")
PASSED, FAILED = 0, 1  # pytest's exit status; below 0 it crashed, any other says that no test ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants by name; default all")
    parser.add_argument("--sample", type=int, metavar="N", help="only N, spread over the list")
    parser.add_argument("--list", action="store_true", help="print the names")
    args = parser.parse_args()
    chosen = _chosen(args)
    if args.list:
        print("\n".join(f"{m.name}: {m.what}" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = _copy(Path(scratch))
        tests = list(dict.fromkeys(m.tests for m in chosen))
        broken = [t for t in tests if _pytest(copy, t) != PASSED]
        for test in broken:
            print(f"fails without any mutant: pytest {test}")
        killed = [m for m in chosen if m.tests not in broken and _killed(copy, m)]
    print(f"{len(killed)} of {len(chosen)} mutants killed")
    return 0 if len(killed) == len(chosen) else 1


def _chosen(args: argparse.Namespace) -> list[Mutant]:
    by_name = {m.name: m for m in MUTANTS}
    unknown = [name for name in args.names if name not in by_name]
    if unknown:
        sys.exit(f"no mutant {', '.join(unknown)}; see --list")
    chosen = [by_name[name] for name in args.names] or MUTANTS
    if args.sample is not None:
        step = max(1, len(chosen) // max(1, args.sample))
        chosen = chosen[::step][: args.sample]
    return chosen


def _copy(scratch: Path) -> Path:
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, scratch / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, scratch / name)
    return scratch


def _killed(copy: Path, mutant: Mutant) -> bool:
    path = copy / mutant.file
    original = path.read_text()
    start = time.perf_counter()
    found = original.count(mutant.old)
    if found != 1:
        print(f"{mutant.name:40} DOES NOT APPLY: {found} places in {mutant.file}", flush=True)
        return False
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        status = _pytest(copy, mutant.tests)
    finally:
        path.write_text(original)
    verdict = {FAILED: "killed", PASSED: "SURVIVED"}.get(status, f"NO TEST RAN (status {status})")
    verdict = "crashed" if status < 0 else verdict  # a read far out of bounds, in the interpreter
    print(f"{mutant.name:40} {verdict:10} {time.perf_counter() - start:5.0f} s", flush=True)
    return status == FAILED or status < 0


def _pytest(copy: Path, tests: str) -> int:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
