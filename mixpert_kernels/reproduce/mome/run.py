"""Run the MoME comparisons and report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ..run import add_seconds, run_all
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
    plots.draw(folder, found)
    path = report.write(folder, found)
    if docs is not None:
        report.publish(folder, docs, found)
    print(report.tables(found))
    print(f"\nreport    {path}\ntotal     {seconds / 60:.1f} minutes")
    return path


def choose(quick: bool, seeds: int | None) -> Settings:
    """The settings that the command line asks for.

    Raises:
        ValueError: ``seeds`` is below 1.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"reproduce: seeds must be at least 1, got {seeds}")
    settings = QUICK if quick else FULL
    return settings if seeds is None else replace(settings, seeds=seeds)
