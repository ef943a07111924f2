"""Kills training runs at random moments, one forked child a run, and goes on with each; prints a JSON line a trial.

Usage: _kill_driver.py ROOT SEED, where ROOT holds the folders of ``_recipes.table``. One process imports everything
once; its children are killed by SIGKILL, as a machine that fails would.

Every child stops at marks and waits there to be let on: before its first and after its last line, at each step, in
the middle of each file of tensors, and before a finished file takes its place. Each trial lets its child run from one
mark towards the next and kills it on the way, a random share of the time that an uninterrupted run took for it. A slow
machine moves a kill between its two marks and never past them, so that all of a run is covered by any machine.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from _recipes import recipe, rows, weights

from mixpert_kernels.training import Recipe, run, train

# What train imports when it needs it; most of a child's time where each has to do so itself.
LATE = ("mixpert_kernels.hf.heads", "matplotlib.figure", "matplotlib.backends.backend_agg")
LATE += ("torch.utils.tensorboard",)


class Mark(NamedTuple):
    """A place in the course of a run, what the checkpoint then says, and the seconds to the next mark."""

    name: str
    place: list[int] | None
    seconds: float


class Child:
    """A run in a forked child; ``watched``, it stops at marks."""

    def __init__(self, settings: Recipe, log: Path, watched: bool = True) -> None:
        (marks, tell), (hear, go) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(marks), os.close(go)  # with the parent gone, waiting for it ends
            _train_and_exit(settings, log, _marker(tell, hear) if watched else None)
        os.close(tell), os.close(hear)
        self.marks, self.go = os.fdopen(marks), go

    def stop(self) -> str:
        """Return the name of the mark where the child now waits; nothing if it has ended."""
        return self.marks.readline().rstrip("\n")

    def let_on(self) -> None:
        os.write(self.go, b".")

    def end(self) -> int:
        """Wait for the child's end; returns its exit code."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.marks.close(), os.close(self.go)
        return status


def _marker(tell: int, hear: int) -> Callable[[str], None]:
    def mark(name: str) -> None:
        os.write(tell, f"{name}\n".encode())
        if not os.read(hear, 1):
            os._exit(2)

    return mark


def _train_and_exit(settings: Recipe, log: Path, mark: Callable[[str], None] | None) -> None:
    status = 1
    try:
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            if mark is not None:
                _set_marks(mark)
                mark("begin")
            train(settings, progress=False)
            if mark is not None:
                mark("end")
            status = 0
    finally:
        os._exit(status)


def _set_marks(mark: Callable[[str], None]) -> None:
    step, save, replace = run.run_step, torch.save, os.replace

    def marked_step(*args: object) -> object:
        mark("step")
        return step(*args)

    def marked_save(state: object, file: io.BufferedWriter) -> None:
        whole = io.BytesIO()
        save(state, whole)
        middle = whole.tell() // 2
        file.write(whole.getbuffer()[:middle])
        file.flush()
        mark(f"half of {Path(file.name).name.strip('.').removesuffix('.draft')}")
        file.write(whole.getbuffer()[middle:])

    def marked_replace(source: Path, target: Path) -> None:
        if not Path(target).name.startswith("."):  # what is put aside has a name drawn at random
            mark(f"all of {Path(target).name}")
        replace(source, target)

    run.run_step, torch.save, os.replace = marked_step, marked_save, marked_replace


def place(output: Path) -> list[int] | None:
    """The stage and step of a run's last checkpoint."""
    if not (output / "checkpoint.pt").exists():
        return None
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    return [saved["stage"], saved["step"]]


def whole_run(root: Path) -> list[Mark]:
    """Run to the end, and say what the marks are."""
    settings, log = recipe(root, "whole"), root / "whole.log"
    child, marks = Child(settings, log), []
    name = child.stop()
    while name:
        saved = place(settings.output)
        start = time.perf_counter()
        child.let_on()
        following = child.stop()
        marks.append(Mark(name, saved, time.perf_counter() - start))
        name = following
    if child.end():
        sys.exit(log.read_text())
    return marks


def trial(root: Path, marks: list[Mark], number: int, share: float) -> dict:
    """Kill a run after mark ``number``, run it to its end, and say what became of it."""
    settings = recipe(root, f"trial{number}")
    output, log = settings.output, root / f"trial{number}.log"
    child = Child(settings, log)
    for mark in marks[: number + 1]:
        name = child.stop()
        assert name == mark.name, f"{name} must be {mark.name}: {log.read_text()[-600:]}"
        child.let_on()
    time.sleep(share * marks[number].seconds)
    os.kill(child.pid, signal.SIGKILL)
    killed = child.end() == -signal.SIGKILL
    found = {
        "between": [mark.name for mark in marks[number : number + 2]],
        "places": [mark.place for mark in marks[number : number + 2]],
        "killed": killed,
        "place": place(output),
        "left": sorted(path.name for path in output.glob(".*")),
    }
    status = Child(settings, log, watched=False).end()
    same, equal = weights(root / "whole"), False
    if status == 0:
        got = weights(output)
        equal = list(got) == list(same) and all(torch.equal(got[k], same[k]) for k in same)
    found |= {
        "status": status,
        "equal": equal,
        "rows": [(r["stage_index"], r["step"]) for r in rows(output)] if status == 0 else [],
        "drafts": [path.name for path in output.glob(".*")],
        "tower": status == 0
        and (output / "tower" / "model.safetensors").read_bytes()
        == (root / "whole" / "tower" / "model.safetensors").read_bytes(),
        "log": log.read_text()[-600:],
    }
    shutil.rmtree(output)
    return found


def main() -> None:
    torch.set_num_threads(1)  # before any work: a fork takes no threads along
    for name in LATE:
        with contextlib.suppress(ImportError):  # optional ones
            importlib.import_module(name)
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    Child(recipe(root, "warm"), root / "warm.log", watched=False).end()
    marks = whole_run(root)
    shares = random.Random(seed)
    for number in range(len(marks) - 1):
        print(json.dumps(trial(root, marks, number, shares.random())), flush=True)


if __name__ == "__main__":
    main()
