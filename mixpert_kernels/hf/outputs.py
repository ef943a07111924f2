"""What a tower returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class MixpertOutput(ModelOutput):
    """Output of FusedMixpertTower.

    Attributes:
        last_hidden_state: (B, T, P) projected features, in batch order.
        expert: (I,) int64, the expert each image went to.
        router_scores: (I, E) float32, softmax probabilities; None with ``output_router=False``.
    """

    last_hidden_state: Tensor | None = None
    expert: Tensor | None = None
    router_scores: Tensor | None = None
