"""A model from disk that has experts, their names and a router of its own: a saved tower, or an MLLM's vision side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mixpert_kernels.hf.expert_names import names_of
from mixpert_kernels.hf.loading import kind_of, load_preprocessing, load_tower

Route = tuple[int, tuple[float, ...]]  # the expert of an image, and the scores


class SavedModel(NamedTuple):
    """What the demo needs to know of it.

    Attributes:
        title: what it is.
        sizes: of what.
        settings: its configuration: number, names and strategy.
        route: from images to their routes.
    """

    title: str
    sizes: str
    settings: Any
    route: Callable[[Sequence[Image.Image]], list[Route]]

    @property
    def names(self) -> list[str]:
        return names_of(self.settings)


def has_experts(directory: Path) -> bool:
    """Whether a directory holds such a model.

    Raises:
        ValueError: it is missing or holds no model.
    """
    return kind_of("demo", directory) in ("tower", "mixpertized")


def load_saved(directory: Path) -> SavedModel:
    """Load one, to a GPU where there is one.

    Raises:
        ValueError: it cannot be loaded, or does not say how images are read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = _tower if kind_of("demo", directory) == "tower" else _vision_side
    return load(directory, device)


def _tower(directory: Path, device: str) -> SavedModel:
    tower = load_tower(directory).to(device)
    preprocess = load_preprocessing(directory, tower.config.vision_config)

    @torch.inference_mode()
    def route(images: Sequence[Image.Image]) -> list[Route]:
        routing = tower.route(tower.trunk_features(preprocess(images).to(device)))
        assert routing.scores is not None  # a router that was asked has scores
        rows = zip(routing.expert.tolist(), routing.scores.tolist(), strict=True)
        return [(expert, tuple(scores)) for expert, scores in rows]

    kind = tower.config.vision_config.model_type
    return SavedModel(f"tower from {directory}", _sizes(kind, tower.config), tower.config, route)


def _vision_side(directory: Path, device: str) -> SavedModel:
    from mixpert_kernels.hf.mllm.vision_side import ImageReader, load_vision_side, route_image

    model, read = load_vision_side(directory).to(device), ImageReader(directory)
    settings = model.base_model.mixpert_settings

    def route(images: Sequence[Image.Image]) -> list[Route]:
        records = [route_image(model, read(image)) for image in images]
        return [(int(r.expert), tuple(r.scores[0].tolist())) for r in records]

    kind = model.config.model_type
    return SavedModel(
        f"vision side of {directory}",
        f"{_sizes(kind, settings)} and the projector",
        settings,
        route,
    )


def _sizes(kind: str, settings: Any) -> str:
    return f"{kind}, {settings.num_experts} experts over the last {settings.expert_layers} layers"
