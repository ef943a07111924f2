"""Kills training runs at random moments, one forked child a run, and goes on with each; prints a JSON line a trial.

Usage: _kill_driver.py ROOT TRIALS SEED, where ROOT holds the folders of ``_recipes.table``. One process imports
everything once; its children are killed by SIGKILL, as a machine that fails would.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from _recipes import recipe, rows, weights

import mixpert_kernels.hf.heads  # noqa: F401, what train would import
from mixpert_kernels.training import Recipe, train


def fork(settings: Recipe, log: Path) -> int:
    """Start a run in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            train(settings, progress=False)
            status = 0
    finally:
        os._exit(status)


def finish(settings: Recipe, log: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork(settings, log), 0)[1])


def trial(root: Path, number: int, moment: float) -> dict:
    """Kill a run after ``moment`` seconds, run it to its end, and say what became of it."""
    settings = recipe(root, f"trial{number}")
    output, log = settings.output, root / f"trial{number}.log"
    child = fork(settings, log)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    place = None
    if (output / "checkpoint.pt").exists():
        saved = torch.load(output / "checkpoint.pt", weights_only=True)
        place = [saved["stage"], saved["step"]]
    left = sorted(path.name for path in output.glob(".*")) if output.exists() else []
    status = finish(settings, log)
    same, equal = weights(root / "whole"), False
    if status == 0:
        got = weights(output)
        equal = list(got) == list(same) and all(torch.equal(got[k], same[k]) for k in same)
    found = {
        "killed": killed,
        "place": place,
        "left": left,
        "status": status,
        "equal": equal,
        "rows": [(r["stage_index"], r["step"]) for r in rows(output)] if status == 0 else [],
        "drafts": [path.name for path in output.glob(".*")],
        "tower": (output / "tower" / "model.safetensors").read_bytes()
        == (root / "whole" / "tower" / "model.safetensors").read_bytes(),
        "log": log.read_text()[-600:],
    }
    shutil.rmtree(output)
    return found


def main() -> None:
    torch.set_num_threads(1)  # before any work: a fork takes no threads along
    root, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    finish(recipe(root, "warm"), root / "warm.log")
    start = time.perf_counter()
    if finish(recipe(root, "whole"), root / "whole.log"):
        sys.exit((root / "whole.log").read_text())
    length = time.perf_counter() - start
    moments = random.Random(seed)
    for number in range(trials):
        print(json.dumps(trial(root, number, length * moments.uniform(0.02, 0.95))), flush=True)


if __name__ == "__main__":
    main()
