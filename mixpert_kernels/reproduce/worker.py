"""One job in a process of one thread: ``python -m mixpert_kernels.reproduce.worker FOLDER JOB JOBS``."""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from pathlib import Path

from mixpert_kernels.training.checkpoint import write_text_whole

from .settings import read_settings

STEP = 1000  # images between two reports


def main(folder: Path, name: str, jobs: str) -> None:
    """Run a job and write ``NAME.json`` when it is done; says on stdout how many images are behind it.

    Args:
        folder: of the run.
        name: of the job.
        jobs: the module that plans and runs it.
    """
    warnings.simplefilter("ignore")
    import torch

    from mixpert_kernels.hf.loading import quiet

    torch.set_num_threads(1)
    study = importlib.import_module(jobs)
    settings = read_settings(folder, study.Settings)
    job = next(job for job in study.plan(settings) if job.name == name)
    waiting = 0

    def progress(images: int) -> None:
        nonlocal waiting
        waiting += images
        if waiting >= STEP:
            print(waiting, flush=True)
            waiting = 0

    start = time.perf_counter()
    with quiet():
        notes = study.run_job(job, settings, folder, progress)
    notes |= {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu seconds": round(time.process_time(), 1),
    }
    write_json(folder / f"{name}.json", notes)


def write_json(path: Path, content: object) -> None:
    """Write a file as a whole or not at all."""
    write_text_whole(path, json.dumps(content, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
