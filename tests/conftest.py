"""What every test runs under: uninitialised memory is NaN, and tests of a GPU are skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the Triton backend is interpreted. Kernels read this when they are defined, so it comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What `mixpert tune` stored for this user is no part of what is tested.
os.environ.setdefault("MIXPERT_BACKEND_TABLE", "0")

# The same examples in every run: a suite that fails does so again.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Fill what ``torch.empty`` and its kin return, in Python and in C++, with NaN.

    PyTorch does so itself in its deterministic mode. ``warn_only``, for ops without a deterministic form are not what
    is tested here. tests/test_backends.py shows that it bites.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(scope="module")
def one_thread():
    """For what is compared bitwise, or with other processes: sums round by the number of threads, which is a machine's.

    For a whole module, before its other fixtures: ``pytestmark = pytest.mark.usefixtures("one_thread")``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
