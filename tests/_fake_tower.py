"""Towers of fake parameters, and what they launch on a GPU that is not there (tests/_fake_gpu.py)."""

from __future__ import annotations

import torch
import transformers
from _fake_gpu import FakeGpu, Launch
from _towers import KINDS, OUT, WIDTH
from torch import Tensor, nn

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.routing import Routing

FUSED = ("siglip", "clip", "dinov2", "vit")
SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 3,
    "image_size": 378, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
BASE = SO400M | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
}  # fmt: skip
SIZES = {"so400m": (SO400M, 3584), "base": (BASE, 1024)}  # of a SigLIP and its projector


def make(gpu: FakeGpu, kind: str = "siglip", *, layers: int = 2, out: int = OUT, **options: object):
    """A tower of fake parameters."""
    row = KINDS["siglip" if kind in SIZES else kind]
    fields, out = SIZES.get(kind, (row.fields, out))
    width = fields.get("hidden_size", WIDTH)
    config = getattr(transformers, row.config)(**fields)
    with torch.device("meta"):
        model = getattr(transformers, row.model)(config)
        projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        options = {"num_experts": 4, "expert_layers": layers, **options}
        tower = FusedMixpertTower.from_vision_model(model, projector, **options)
    return gpu.move(tower.eval())


def pixels(gpu: FakeGpu, tower: FusedMixpertTower, batch: int) -> Tensor:
    size = tower.config.vision_config.image_size
    return gpu.empty(batch, 3, size, size)


def ids(gpu: FakeGpu, count: int) -> Tensor:
    return gpu.empty(count, dtype=torch.int64)


def segment(gpu: FakeGpu, tower: FusedMixpertTower, batch: int, tokens: int = 17) -> list[str]:
    """Names of what the expert segment launches, its routing given."""
    width = tower.config.vision_config.hidden_size
    x = gpu.empty(batch, tokens, width)
    given = (
        gpu.empty(size, dtype=torch.int32) for size in (batch, batch, tower.config.num_experts + 1)
    )
    with gpu.running() as launches, torch.no_grad():
        tower.expert_segment(x, Routing(*given))
    return [launch.name for launch in launches]


def forward(gpu: FakeGpu, tower: FusedMixpertTower, batch: int, **call: object) -> list[Launch]:
    """What a whole forward launches after the trunk."""
    images = pixels(gpu, tower, batch)
    with torch.no_grad():
        with gpu.running() as launches:
            tower.trunk_features(images)
            trunk = len(launches)
        with gpu.running() as launches:
            tower(images, **call)
            return launches[trunk:]
