"""The demo's tower: a random SigLIP at a chosen geometry, or a vision model from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.demo.images import DOMAINS, Sample
from mixpert_kernels.hf.configuration import MixpertVisionConfig
from mixpert_kernels.hf.expert_names import names_of
from mixpert_kernels.hf.loading import (
    Preprocess,
    load_preprocessing,
    load_vision_model,
    random_siglip,
)


class Geometry(NamedTuple):
    """Sizes of a SigLIP vision model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int


GEOMETRIES = {
    "tiny": Geometry(192, 768, 8, 3, 224, 16),
    "base": Geometry(768, 3072, 12, 12, 224, 16),
    "so400m": Geometry(1152, 4304, 27, 16, 384, 14),
}
TRAINING_FLOP = 8e12  # about a minute on two cores: limits the training images of large models
LEARNING_RATE = 1e-2  # of the router: 300 full-batch steps reach 98 % on the training images
HEAVY_FLOP = 1e11  # an image of more than this is run, and timed, in small batches


class DemoModel(NamedTuple):
    """A tower with what the demo needs to know about it."""

    tower: FusedMixpertTower
    preprocess: Preprocess
    title: str  # says so where weights are random
    flop_per_image: float  # about: two for each weight and token

    @property
    def settings(self) -> MixpertVisionConfig:
        return self.tower.config

    @property
    def names(self) -> list[str]:
        return names_of(self.tower.config)

    @property
    def sizes(self) -> str:
        config = self.tower.config
        vision = config.vision_config
        return (
            f"D = {vision.hidden_size}, {vision.num_hidden_layers} layers, "
            f"{config.num_experts} experts over the last {config.expert_layers} and the projector"
        )

    @property
    def images_per_domain(self) -> int:
        if self.tower.device.type == "cuda":
            return 80
        return int(min(80, max(12, TRAINING_FLOP / self.flop_per_image / len(DOMAINS))))

    @property
    def heavy(self) -> bool:
        return self.flop_per_image > HEAVY_FLOP and self.tower.device.type != "cuda"


def expert_names(num_experts: int) -> list[str]:
    """Expert 0 is versatile, then one a domain; experts beyond the domains have none."""
    spare = (f"spare {i}" for i in range(1, num_experts))
    return ["versatile", *DOMAINS, *spare][:num_experts]


def expert_of(domain: str, names: Sequence[str]) -> int:
    """The expert of a domain; the versatile one serves domains without an expert of their own."""
    return names.index(domain) if domain in names else 0


def build_model(geometry: str, model: Path | None, num_experts: int, seed: int) -> DemoModel:
    """Make the demo's tower, on a GPU where there is one.

    Args:
        geometry: a name of ``GEOMETRIES``; unused where ``model`` is given.
        model: directory of a transformers vision checkpoint, or None for random weights.
        num_experts: at least 1.
        seed: of the random weights and the router's.

    Raises:
        ValueError: ``model`` cannot be loaded, or num_experts is below 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model is None:
            vision, projector = random_siglip(**GEOMETRIES[geometry]._asdict()), None
            title = f"SigLIP-type tower, geometry {geometry}, RANDOM trunk weights"
        else:
            vision, projector = load_vision_model(model, dtype=torch.float32)
            title = f"{vision.config.model_type} weights from {model}"
        width = vision.config.hidden_size
        if projector is None:
            wide = 2 * width
            projector = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, wide))
        tower = FusedMixpertTower.from_vision_model(
            vision, projector, num_experts=num_experts, expert_names=expert_names(num_experts)
        )
    tower.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    preprocess = load_preprocessing(model, tower.config.vision_config)
    return DemoModel(tower, preprocess, title, _flop_per_image(vision))


def pixels_of(model: DemoModel, samples: Sequence[Sample]) -> Tensor:  # (B, 3, H, W)
    return model.preprocess([sample.image for sample in samples]).to(model.tower.device)


@torch.inference_mode()
def features_of(model: DemoModel, samples: Sequence[Sample], batch: int = 8) -> Tensor:  # (I, D)
    """What the router scores, image by image: the trunk's features, pooled."""
    starts = tqdm(
        range(0, len(samples), batch), desc="trunk features", unit="batch", leave=False, delay=1
    )
    rows = [model.tower.router_features(pixels_of(model, samples[i : i + batch])) for i in starts]
    return torch.cat(rows)


def train_router(model: DemoModel, samples: Sequence[Sample], seed: int) -> float:
    """Fit the router to the samples' domains; returns the accuracy on these samples."""
    from mixpert_kernels.training import fit_router

    names = model.names
    labels = torch.tensor([expert_of(sample.domain or "", names) for sample in samples])
    features = features_of(model, samples).clone()
    return fit_router(model.tower, features, labels, lr=LEARNING_RATE, seed=seed, progress=True)


def _flop_per_image(vision: Any) -> float:
    config = vision.config
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    patch = config.patch_size if isinstance(config.patch_size, int) else min(config.patch_size)
    return 2.0 * sum(p.numel() for p in vision.parameters()) * (side // patch) ** 2
