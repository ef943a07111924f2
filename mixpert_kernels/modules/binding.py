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


class _TracedBinding:
    """torch.compile traces one thread, and does not look into thread-local objects."""

    def __init__(self) -> None:
        self.routing: Routing | None = None


_eager = _Binding()
_traced = _TracedBinding()


def _binding() -> _Binding | _TracedBinding:
    return _traced if torch.compiler.is_compiling() else _eager


def bind(routing: Routing | None) -> Routing | None:
    """Bind ``routing`` and return what was bound before, for the caller to bind again when it is done."""
    binding = _binding()
    before, binding.routing = binding.routing, routing
    return before


def peek() -> Routing | None:
    """Return the routing that is bound; None outside every block."""
    return _binding().routing


def bound_routing(leaf: str) -> Routing:
    """Return the routing bound by the block that is running.

    Raises:
        RuntimeError: ``leaf`` was called outside its ExpertBlock.
    """
    routing = _binding().routing
    if routing is None:
        raise RuntimeError(f"{leaf}: must be called by its ExpertBlock, which binds the routing")
    return routing
