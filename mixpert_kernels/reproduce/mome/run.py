"""Run the MoME comparisons and report."""

from __future__ import annotations

import time
from pathlib import Path

from ..run import add_seconds, present, run_all, with_seeds
from . import jobs, plots, report, results
from .settings import FULL, QUICK, Settings


def reproduce(
    folder: Path, settings: Settings, processes: int | None = None, docs: Path | None = None
) -> Path:
    """Run the comparisons, print the tables, draw and write the report; returns its path.

    Args:
        folder: where results are kept; a run that was interrupted goes on there.
        settings: of the run.
        processes: how many at a time; None: as many as there are CPUs, at most 2.
        docs: where to write the report as a page too, with its plots and numbers.
    """
    start = time.perf_counter()
    run_all(folder, settings, processes, jobs)
    seconds = add_seconds(folder, time.perf_counter() - start)
    found = results.gather(folder, settings, seconds)
    return present(folder, found, docs, plots, report)


def choose(quick: bool, seeds: int | None) -> Settings:
    """The settings that the command line asks for; ValueError where ``seeds`` is below 1."""
    return with_seeds(QUICK if quick else FULL, seeds)
