"""Which experts a batch hits: a hook on the last block of experts."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .optimizer import ExpertOptimizer


def watch(tower: nn.Module, optimizer: ExpertOptimizer) -> None:
    """Have the optimizer told what the last expert block serves, whoever calls it, for as long as it lives."""
    block = tower.experts[-1] if tower.projector is None else tower.projector
    handle = block.register_forward_hook(_Hits(optimizer))
    weakref.finalize(optimizer, handle.remove)


class _Hits:
    """A forward hook that counts an expert as hit once backward reaches what it gave; a copy of it does nothing."""

    def __init__(self, optimizer: ExpertOptimizer | None = None) -> None:
        self.optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __reduce__(
        self,
    ) -> tuple:  # of a copied or pickled model: the optimizer is not of its parameters
        return _Hits, ()

    def __call__(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is None or not optimizer.counting or not output.requires_grad:
            return
        expert = args[1].expert
        if torch.compiler.is_compiling():  # PyTorch 2.11 cannot trace a hook of backward
            optimizer.hit(expert)
        else:
            output.register_hook(lambda gradient: optimizer.hit(expert))
