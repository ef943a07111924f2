"""What is measured: geometries, routes, random weights, the plain transformers tower."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import torch
from _harness import DEVICE, DTYPE
from torch import Tensor, nn

if TYPE_CHECKING:
    from mixpert_kernels import FusedMixpertTower

NUM_EXPERTS = 4


@dataclass(frozen=True)
class Geometry:
    """Sizes of a SigLIP tower and its projector Linear(D, P) - GELU - Linear(P, P)."""

    name: str
    hidden: int
    heads: int
    intermediate: int
    layers: int
    image: int
    patch: int
    projected: int
    cloned: int = 2

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2

    def layer_flop(self) -> float:
        """Multiplications and additions of the GEMMs of one encoder layer for one tile."""
        linears = 2 * self.tokens * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        return linears + 4 * self.tokens**2 * self.hidden

    def segment_flop(self) -> float:
        projector = 2 * self.tokens * (self.hidden * self.projected + self.projected**2)
        return self.cloned * self.layer_flop() + projector

    def tower_flop(self) -> float:
        patches = 2 * self.tokens * 3 * self.patch**2 * self.hidden
        return patches + (self.layers - self.cloned) * self.layer_flop() + self.segment_flop()


TINY = Geometry("tiny", 64, 4, 136, 4, 64, 16, 96)
BASE = Geometry("SigLIP-base", 768, 12, 3072, 12, 224, 16, 2048)
SO400M = Geometry(
    "SigLIP-so400m", 1152, 16, 4304, 4, 378, 14, 3584
)  # 4 of its 26 layers: the shapes are what matters

ROUTES = ("balanced", "skewed", "one_expert")


def route_of(kind: str, batch: int, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Expert of each tile: all experts alike, half of the tiles to expert 0, or all to expert 1."""
    b = torch.arange(batch)
    expert = {
        "balanced": b % num_experts,
        "skewed": torch.where(b % 2 == 0, 0, 1 + (b // 2) % (num_experts - 1)),
        "one_expert": torch.ones_like(b),
    }[kind]
    return expert.to(DEVICE)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of its own: experts differ, no output is degenerate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.03
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(values + 1 if is_norm else values)
    return module


def uninitialised() -> AbstractContextManager:
    """Models made within are not initialised by transformers: that is slow."""
    from transformers import PreTrainedModel

    return mock.patch.object(PreTrainedModel, "init_weights")


def vision_model(geometry: Geometry) -> nn.Module:
    """A transformers SigLIP encoder without pooling head, to be given weights by `randomise`."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        image_size=geometry.image,
        patch_size=geometry.patch,
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    with uninitialised():
        return SiglipVisionModel(config).eval()


def projector(geometry: Geometry) -> nn.Module:
    return nn.Sequential(
        nn.Linear(geometry.hidden, geometry.projected),
        nn.GELU(),
        nn.Linear(geometry.projected, geometry.projected),
    )


class PlainTower(nn.Module):
    """Patches, transformers' layers, the projector: one expert, nothing of ours, no post-norm."""

    def __init__(self, model: nn.Module, projector: nn.Module, cloned: int = 2) -> None:
        super().__init__()
        model = getattr(model, "vision_model", model)
        self.embeddings = model.embeddings
        self.trunk = nn.ModuleList(model.encoder.layers[:-cloned])
        self.layers = nn.ModuleList(model.encoder.layers[-cloned:])
        self.projector = projector

    def trunk_features(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values)
        for layer in self.trunk:
            x = layer(x, None)
        return x

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The cloned layers and the projector, each a function of its input alone."""
        return [*(partial(layer, attention_mask=None) for layer in self.layers), self.projector]

    def segment(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x)
        return x

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.segment(self.trunk_features(pixel_values))


def towers(geometry: Geometry) -> tuple[FusedMixpertTower, list[PlainTower]]:
    """Our tower with four distinct random experts, and each as a plain transformers tower."""
    from mixpert_kernels import FusedMixpertTower

    ours = FusedMixpertTower.from_vision_model(
        vision_model(geometry),
        projector(geometry),
        num_experts=NUM_EXPERTS,
        expert_layers=geometry.cloned,
    )
    randomise(ours).to(DEVICE, DTYPE).eval()
    with uninitialised():
        exported = [ours.export_expert(e) for e in range(NUM_EXPERTS)]
    return ours, [
        PlainTower(*parts, geometry.cloned).to(DEVICE, DTYPE).eval() for parts in exported
    ]


def in_float32(towers: list[PlainTower]) -> list[PlainTower]:
    """The same towers for the truth: themselves, or copies where they are of a lower precision."""
    return towers if DTYPE is torch.float32 else [copy.deepcopy(tower).float() for tower in towers]
