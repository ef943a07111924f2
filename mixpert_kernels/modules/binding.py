"""The routing that the leaves of a running block read.

A transformers block calls its leaves without knowing of experts, so the routing reaches them beside the call. It is
bound by ``ExpertBlock.forward`` from its own argument, for the extent of that one call, a thread at a time; it is never
kept. So a block that gradient checkpointing runs again in backward sees the routing it was first run with, however many
other forwards happened in between.
"""

from __future__ import annotations

import threading

import torch

from mixpert_kernels.routing import Routing


class _Binding(threading.local):
    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.rows: int | None = None


class _TracedBinding:
    """torch.compile traces one thread, and does not look into thread-local objects."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.rows: int | None = None


_eager = _Binding()
_traced = _TracedBinding()


def _binding() -> _Binding | _TracedBinding:
    return _traced if torch.compiler.is_compiling() else _eager


def bind(routing: Routing | None, rows: int | None = None) -> tuple[Routing | None, int | None]:
    """Bind a routing and return what was bound before, for the caller to bind again when it is done.

    Args:
        routing: of the block that is about to run.
        rows: R, the number of its packed rows; not needed for tiles of one size.
    """
    binding = _binding()
    before = binding.routing, binding.rows
    binding.routing, binding.rows = routing, rows
    return before


def peek() -> tuple[Routing | None, int | None]:
    """Return the routing that is bound, and R; Nones outside every block."""
    binding = _binding()
    return binding.routing, binding.rows


def bound_routing(leaf: str, rows: int | None = None) -> Routing:
    """Return the routing bound by the block that is running, for ``rows`` packed rows (by default R).

    A leaf behind a merger has R / k rows, each of k neighbours. That k is the ratio of two sizes the host knows.

    Raises:
        RuntimeError: ``leaf`` was called outside its ExpertBlock, or ``bind`` was not told R.
        ValueError: the rows are neither a whole part of R nor a multiple.
    """
    routing, bound = peek()
    if routing is None:
        raise RuntimeError(f"{leaf}: must be called by its ExpertBlock, which binds the routing")
    if routing.cu_seqlens is None or rows is None:
        return routing
    if bound is None:
        raise RuntimeError(f"{leaf}: packed rows need bind to be told how many there are")
    return routing.resized(rows, bound)
