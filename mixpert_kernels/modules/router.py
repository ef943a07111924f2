"""The router: pooled features to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixpert_kernels.backends.reference.route import score
from mixpert_kernels.ops import RouterWeights


class Router(nn.Module):
    """LayerNorm, then linear, or linear-GELU-linear where ``hidden`` is given.

    Args:
        width: D.
        num_experts: E.
        hidden: width of the hidden layer; None for a linear router.
    """

    eps = 1e-5

    def __init__(self, width: int, num_experts: int, hidden: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=self.eps)
        self.hidden = nn.Linear(width, hidden) if hidden is not None else None
        self.out = nn.Linear(hidden or width, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        for layer in (self.hidden, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def resize(self, num_experts: int) -> None:
        """Start anew with ``num_experts`` scores, on the device and in the dtype it was."""
        old = self.out.weight
        self.out = nn.Linear(old.shape[1], num_experts, device=old.device, dtype=old.dtype)
        self.reset_parameters()

    @property
    def weights(self) -> RouterWeights:
        hidden = (None, None) if self.hidden is None else (self.hidden.weight, self.hidden.bias)
        return RouterWeights(
            self.norm.weight, self.norm.bias, *hidden, self.out.weight, self.out.bias
        )

    def weights_on(self, device: torch.device) -> RouterWeights:
        return RouterWeights(*(None if w is None else w.to(device) for w in self.weights))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (I, D) to logits (I, E), in the features' dtype; for training on cached features."""
        params = [None if p is None else p.to(pooled.dtype) for p in self.weights]
        with torch.autocast(pooled.device.type, enabled=False):
            return score(pooled, *params, self.eps)
