"""Which backend serves a call.

A backend is a folder here; it has a module for each op it implements, and a ``why_not(op, device, dtype)`` of its own.
``auto`` tries first what ``choice`` knows to be the fastest, then the others in the order of ``BACKENDS``; a backend
named by the caller never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from . import choice

# The order in which those come of which choice.py knows nothing better. `cpu` ran the expert segment of the reference
# geometry in less time than the plain transformers layers (README, benchmarks/bench_expert_segment.py). `triton` and
# `cuda` have not been measured on a GPU yet: they come before `reference` for the launches they save (docs/kernels.md).
# `reference` runs anywhere.
BACKENDS = ("cpu", "triton", "cuda", "reference")


def why_not(op: str, backend: str, *, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` cannot run ``op`` on ``device`` in ``dtype``; None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend; there are {', '.join(BACKENDS)}"
    if not _implements(backend, op):
        return f"has no {op}"
    return _module(backend).why_not(op, torch.device(device), dtype)


def pick(
    op: str,
    backend: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    widths: tuple[int, ...] = (),
) -> ModuleType:
    """Return the module that implements ``op``.

    Args:
        op: name of the op.
        backend: ``"auto"`` or one of ``BACKENDS``.
        device: of the features.
        dtype: of the features.
        widths: of the layer, which a measurement is of. No number of tiles or tokens: a tile's result must not depend
            on the batch it is in.

    Raises:
        RuntimeError: no backend, or not the named one, can run the call; one line a backend with its reason.
    """
    automatic = backend == "auto"
    reasons = []
    for name in in_order(op, device, dtype, widths) if automatic else (backend,):
        if automatic and name == "triton" and torch.device(device).type == "cpu":
            reasons.append(f"  {name}: is interpreted on a CPU only where it is named")
            continue
        reason = why_not(op, name, device=device, dtype=dtype)
        if reason is None:
            return _module(f"{name}.{op}")
        reasons.append(f"  {name}: {reason}")
    raise RuntimeError("\n".join([f"{op}: no backend can run this call", *reasons]))


def in_order(
    op: str, device: torch.device | str, dtype: torch.dtype, widths: tuple[int, ...] = ()
) -> tuple[str, ...]:
    """The backends as ``auto`` tries them."""
    return _starting_with(choice.first(op, torch.device(device), dtype, widths), BACKENDS)


@functools.cache
def _starting_with(first: str | None, backends: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(backends, key=lambda name: name != first))  # stable


@functools.cache
def _module(path: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{path}")


@functools.cache
def _implements(backend: str, op: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{backend}.{op}") is not None
