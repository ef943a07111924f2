"""Run all jobs in processes of one thread each, some side by side, and report."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from . import cost, plots, report, results
from . import jobs as comparisons
from .data import DOMAINS, write_folder
from .jobs import Job
from .settings import FULL, QUICK, Settings, open_folder
from .styles import SPLITS
from .worker import write_json

WIDTHS = (48, 32, 24)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_all(
    folder: Path, settings: Any, processes: int | None = None, study: ModuleType = comparisons
) -> None:
    """Run what is not done yet of a run of the comparisons.

    Args:
        folder: where results are kept; a run that was interrupted goes on there.
        settings: of the run.
        processes: how many at a time; None: as many as there are CPUs, at most 2.
        study: the module with ``Settings``, ``plan`` and ``run_job``.

    Raises:
        ValueError: ``processes`` is below 1, or the folder holds a run with other settings.
        RuntimeError: a job failed; its log says why, the other jobs' results are kept.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"reproduce: processes must be at least 1, got {processes}")
    open_folder(folder, settings)
    jobs = study.plan(settings)
    done = {job.name for job in jobs if (folder / f"{job.name}.json").is_file()}
    total = sum(job.images for job in jobs)
    before = sum(job.images for job in jobs if job.name in done)
    processes = processes or min(2, os.cpu_count() or 1)
    with tqdm(
        total=total, initial=before, unit="image", unit_scale=True, desc="training", disable=None
    ) as bar:
        start = functools.partial(_start, folder=folder, study=study.__name__, bar=bar)
        _schedule([job for job in jobs if job.name not in done], done, processes, start)


def _schedule(jobs: list[Job], done: set[str], processes: int, start: Callable) -> None:
    running: dict[Future, Job] = {}
    stop = threading.Event()
    with ThreadPoolExecutor(processes) as pool:
        try:
            while jobs or running:
                for job in [job for job in jobs if done.issuperset(job.after)]:
                    if len(running) == processes:
                        break
                    jobs.remove(job)
                    running[pool.submit(start, job, stop=stop)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done.add(running.pop(future).name)
                    future.result()
        except BaseException:
            stop.set()
            raise


def _start(job: Job, *, folder: Path, study: str, bar: tqdm, stop: threading.Event) -> None:
    """Run one job's process and pass its progress on; stop it when another failed."""
    log = folder / f"{job.name}.log"
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONPATH": _import_path()}
    worker = "mixpert_kernels.reproduce.worker"
    command = [sys.executable, "-m", worker, str(folder), job.name, study]
    seen = 0
    with (
        open(log, "w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        threading.Thread(target=_stop_process, args=(process, stop), daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            bar.update(int(line))
            seen += int(line)
    if process.returncode:
        text = log.read_text(encoding="utf-8").strip().splitlines()
        last = text[-1] if text else f"exit status {process.returncode}"
        raise RuntimeError(f"reproduce: job {job.name} must finish, got {last} (see {log})")
    bar.update(job.images - seen)
    log.unlink()


def _stop_process(process: subprocess.Popen, stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(0.2):
            process.terminate()
            return


def _import_path() -> str:
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def reproduce(
    folder: Path, settings: Settings, processes: int | None = None, docs: Path | None = None
) -> Path:
    """Run the comparisons, print the tables, draw and write the report; returns its path.

    Args:
        folder: where results are kept; a run that was interrupted goes on there.
        settings: of the run.
        processes: as of ``run_all``.
        docs: where to write the report as a page too, with its plots and numbers.
    """
    start = time.perf_counter()
    run_all(folder, settings, processes)
    measured = cost.measure(folder, settings)
    seconds = add_seconds(folder, time.perf_counter() - start)
    found = results.gather(folder, settings, measured, seconds)
    return present(folder, found, docs, plots, report)


def present(
    folder: Path, found: dict[str, Any], docs: Path | None, plots: ModuleType, report: ModuleType
) -> Path:
    """Draw what was found, write its report, and as a page below ``docs`` where given, and print it.

    Args:
        folder: of the run.
        found: as ``results.gather`` returns it.
        docs: where to write the report as a page too, with its plots and numbers.
        plots: the study's module with ``draw``.
        report: the study's module with ``write``, ``publish`` and ``tables``.

    Returns:
        The report's path.
    """
    plots.draw(folder, found)
    path = report.write(folder, found)
    if docs is not None:
        report.publish(folder, docs, found)
    print(report.tables(found))
    print(f"\nreport    {path}\ntotal     {found['seconds'] / 60:.1f} minutes")
    return path


def add_seconds(folder: Path, seconds: float) -> float:
    """Add to the wall time of a run, over all times it was started; returns the sum."""
    path = folder / "wall.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
    write_json(path, before + seconds)
    return before + seconds


def run_pilot(folder: Path, settings: Settings, processes: int | None = None) -> Path:
    """Train joint and task-specific encoders of several widths, one seed; the next report shows them."""
    inner = folder / "pilot"
    settings = replace(settings, seeds=1, widths=settings.widths or WIDTHS)
    run_all(inner, settings, processes)
    rows = results.pilot(inner, settings)
    write_json(folder / results.PILOT, rows)
    print(report.columns(report.pilot_table(rows)))
    return folder / results.PILOT


def choose(quick: bool, seeds: int | None) -> Settings:
    """The settings that the command line asks for; ValueError where ``seeds`` is below 1."""
    return with_seeds(QUICK if quick else FULL, seeds)


def with_seeds(settings: Any, seeds: int | None) -> Any:
    """A study's settings with another number of seeds; None: as they are.

    Raises:
        ValueError: ``seeds`` is below 1.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"reproduce: seeds must be at least 1, got {seeds}")
    return settings if seeds is None else replace(settings, seeds=seeds)


def write_data(root: Path, images: int, seed: int) -> None:
    """Write the data as a folder for ``mixpert train``.

    Raises:
        ValueError: no images are asked for, or ``root`` is a file.
    """
    if images < 1:
        raise ValueError(f"reproduce: images must be at least 1, got {images}")
    if root.exists() and not root.is_dir():
        raise ValueError(f"reproduce: write-data must be a directory, got the file {root}")
    total = images * len(SPLITS) * len(DOMAINS)
    with tqdm(total=total, unit="image", desc="drawing", delay=1, disable=None) as bar:
        for count in write_folder(root, images, seed):
            bar.update(count)
    print(f"wrote {total} images to {root}")
