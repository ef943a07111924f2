"""The model of the comparisons: a small SigLIP encoder, a projector, and one linear layer over all domains' labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixpert_kernels.hf.heads import Classifier
from mixpert_kernels.hf.loading import random_siglip
from mixpert_kernels.hf.tower import FusedMixpertTower
from mixpert_kernels.routing import Routing

from .data import EXPERTS, LABELS, SIDE, as_input
from .settings import Settings

EVALUATION_BATCH = 250


def new_model(settings: Settings, seed: int) -> Classifier:
    """A model of one expert with random weights, always the same for a seed."""
    torch.manual_seed(seed)
    vision = random_siglip(
        hidden=settings.hidden,
        intermediate=settings.intermediate,
        layers=settings.layers,
        heads=settings.heads,
        image_size=SIDE,
        patch_size=settings.patch,
    )
    width = settings.projector
    projector = nn.Sequential(nn.Linear(settings.hidden, width), nn.GELU(), nn.Linear(width, width))
    tower = FusedMixpertTower.from_vision_model(vision, projector, num_experts=1)
    return Classifier(tower, LABELS).train()


def recut(model: Classifier, cloned: int) -> Classifier:
    """The same function of one expert, cut so that its last ``cloned`` layers are what ``clone`` copies."""
    vision, projector = model.tower.export_expert(0)
    tower = FusedMixpertTower.from_vision_model(
        vision, projector, num_experts=1, expert_layers=cloned
    )
    other = Classifier(tower, LABELS)
    other.head.load_state_dict(model.head.state_dict())
    return other


def name_experts(model: Classifier) -> None:
    model.tower.config.expert_names = list(EXPERTS)


@torch.no_grad()
def trunk_features(tower: FusedMixpertTower, pixels: Tensor) -> Tensor:
    """What the shared layers give for uint8 images: (N, T, D) float32."""
    parts = pixels.split(EVALUATION_BATCH)
    return torch.cat([tower.trunk_features(as_input(part)) for part in parts])


def segment_logits(model: Classifier, features: Tensor, expert: Tensor) -> Tensor:
    """Logits (N, C) of trunk features (N, T, D), each image through its expert (N,)."""
    routing = Routing.forced(expert, model.tower.config.num_experts)
    return model.logits(model.tower.expert_segment(features, routing))


@torch.no_grad()
def predict(model: Classifier, features: Tensor, expert: int = 0) -> Tensor:
    """The best label of each image (N,) by one expert, from trunk features."""
    model.eval()
    parts = features.split(EVALUATION_BATCH)
    routes = [torch.full((len(part),), expert) for part in parts]
    found = [segment_logits(model, *pair).argmax(-1) for pair in zip(parts, routes, strict=True)]
    return torch.cat(found)


def layer_parameters(settings: Settings) -> int:
    d, i = settings.hidden, settings.intermediate
    return 4 * (d * d + d) + 2 * d * i + i + d + 4 * d


def projector_parameters(settings: Settings) -> int:
    d, p = settings.hidden, settings.projector
    return d * p + p + p * p + p


def encoder_flops(settings: Settings) -> int:
    """Multiplications and additions of encoder and projector for one image, in matrix products alone."""
    d, i, t, p = settings.hidden, settings.intermediate, settings.tokens, settings.projector
    embedding = 2 * t * d * 3 * settings.patch**2
    layer = 2 * t * (4 * d * d + 2 * d * i) + 4 * t * t * d
    return embedding + settings.layers * layer + 2 * t * (d * p + p * p)


def router_flops(settings: Settings) -> int:
    return 2 * settings.hidden * len(EXPERTS)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
