"""Tests of compiled kernels, in processes of their own.

The Triton backend of the main process is interpreted (tests/conftest.py), and a kernel is either interpreted or
compiled from its definition on. So a test here is an ordinary pytest function, but its body runs in one of the worker
processes of ``_worker.py``, all of which start on the collected tests at once; pytest's own process waits for each
result in turn and reports the worker's traceback.

To add one, write ``test_<op>.py`` with module-level functions::

    from ._emulate import emulated
    from ._worker import full

    @pytest.mark.parametrize("arch", [80, 90])
    @pytest.mark.parametrize("seed", [0, pytest.param(1, marks=full), pytest.param(2, marks=full)])
    def test_something(arch, seed):
        with emulated(arch=arch, seed=seed) as launches:
            y, pre = triton.grouped_linear.grouped_linear(x, ...)
        assert_as_accurate("y", y, plain, truth)

Arguments come from ``parametrize`` alone and must pickle; no fixtures, and no state between tests. ``assert`` is not
rewritten in the workers, so give it a message. ``full`` marks what only ``MIXPERT_COMPILED=full`` runs.
"""

from __future__ import annotations

import importlib.util
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest

from . import _worker

HERE = Path(__file__).parent
MISSING = {  # pattern of the tests: what they need and is not here
    "test_cuda_*.py": None if shutil.which("nvcc") else "nvcc is not on PATH",
    "test_[!c]*.py": None if importlib.util.find_spec("triton") else "triton is not installed",
}
collect_ignore_glob = [pattern for pattern, reason in MISSING.items() if reason]
results = pytest.StashKey[Future]()
workers = pytest.StashKey[object]()


def pytest_runtestloop(session: pytest.Session) -> None:
    """Hand every case to the workers before the first test of the session runs."""
    cases = [item for item in session.items if _is_case(item) and not _is_skipped(item)]
    if not cases or session.config.option.collectonly:
        return
    session.stash[workers] = executor = _worker.pool(len(cases))
    for item in cases:
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        name = item.originalname
        item.stash[results] = executor.submit(_worker.run, item.module.__name__, name, arguments)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Wait for the result instead of calling the function."""
    if not _is_case(pyfuncitem):
        return None
    outcome, text = pyfuncitem.stash[results].result()
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if workers in session.stash:
        session.stash[workers].shutdown(cancel_futures=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for pattern, reason in MISSING.items():
        if reason:
            terminalreporter.write_line(f"tests/compiled/{pattern} was left out: {reason}")


def _is_case(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and HERE in item.path.parents


def _is_skipped(item: pytest.Item) -> bool:
    marks = item.iter_markers()
    return any(m.name == "skip" or (m.name == "skipif" and m.args[0]) for m in marks)
