"""The processes that run the cases of tests/compiled: kernels are compiled there, never interpreted."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any

import pytest

# A mark for tests, and for parameters of tests, that cost more than every run should pay.
full = pytest.mark.skipif(
    os.environ.get("MIXPERT_COMPILED") != "full", reason="slow: MIXPERT_COMPILED=full runs it"
)


def pool(cases: int) -> ProcessPoolExecutor:
    """As many processes as cores, no more than cases; each starts with a fresh interpreter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPoolExecutor(min(cores or 1, cases), get_context("spawn"), _prepare)


def _prepare() -> None:
    # Triton reads the first when a kernel is defined, OpenMP the second when torch is imported: neither has been yet.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every Triton up to 3.9 does
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _leave_with_parent() -> None:
    """A pool's processes outlive a parent that is killed, and would go on."""
    parent_process().join()
    os._exit(1)


def run(module: str, function: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """Call a test in this process; returns ``passed``, ``skipped`` or ``failed``, and the reason or the traceback."""
    try:
        getattr(importlib.import_module(module), function)(**arguments)
    except pytest.skip.Exception as skip:
        return "skipped", str(skip)
    except (Exception, pytest.fail.Exception):
        kind, error, frames = sys.exc_info()
        frames = frames.tb_next if frames is not None else None  # without this function's own
        return "failed", "".join(traceback.format_exception(kind, error, frames))
    return "passed", ""
