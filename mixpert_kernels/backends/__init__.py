"""Which backend serves a call.

A backend is a folder here; it has a module for each op it implements, and a ``why_not(op, device, dtype)`` of its own.
``auto`` takes the first of ``BACKENDS`` that can run the call; a backend named by the caller never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

# In order of preference. `cpu` ran the expert segment of the reference geometry in less time than the plain
# transformers layers (README, benchmarks/bench_expert_segment.py). `triton` has not been measured on a GPU yet: it
# comes before `reference` for the launches it saves (docs/kernels.md). `reference` runs anywhere.
BACKENDS = ("cpu", "triton", "cuda", "reference")


def why_not(op: str, backend: str, *, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` cannot run ``op`` on ``device`` in ``dtype``; None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend; there are {', '.join(BACKENDS)}"
    if not _implements(backend, op):
        return f"has no {op}"
    folder = importlib.import_module(f"{__name__}.{backend}")
    return folder.why_not(op, torch.device(device), dtype)


def pick(op: str, backend: str, *, device: torch.device | str, dtype: torch.dtype) -> ModuleType:
    """Return the module that implements ``op``.

    Args:
        op: name of the op.
        backend: ``"auto"`` or one of ``BACKENDS``.
        device: of the features.
        dtype: of the features.

    Raises:
        RuntimeError: no backend, or not the named one, can run the call; one line a backend with its reason.
    """
    automatic = backend == "auto"
    reasons = []
    for name in BACKENDS if automatic else (backend,):
        if automatic and name == "triton" and torch.device(device).type == "cpu":
            reasons.append(f"  {name}: is interpreted on a CPU only where it is named")
            continue
        reason = why_not(op, name, device=device, dtype=dtype)
        if reason is None:
            return importlib.import_module(f"{__name__}.{name}.{op}")
        reasons.append(f"  {name}: {reason}")
    raise RuntimeError("\n".join([f"{op}: no backend can run this call", *reasons]))


@functools.cache
def _implements(backend: str, op: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{backend}.{op}") is not None
