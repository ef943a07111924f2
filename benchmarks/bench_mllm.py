"""Vision time of whole vision-language models: mixpertized, every image another expert, against the plain model.

Timed is ``get_image_features``, from pixels to what the language model is given. ``plain`` is the transformers model
before ``mixpertize``; ``naive_loop`` is it with a Python loop over the experts in each cloned block and the projector.
Families whose tower takes packed patches of any size are not among them.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _baselines as baselines
import pytest
import torch
import transformers
from _harness import DEVICE, DTYPE, SIZE, Scenario, Variant
from _models import BASE, NUM_EXPERTS, TINY, Geometry, randomise, uninitialised
from torch import Tensor, nn

from mixpert_kernels.hf.mllm import added_cost, forced_routing, mixpertize, unmixpertize

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from _mllms import KINDS

BATCH = 8
FAMILIES = [
    family for family, kind in KINDS.items() if "image_size" in kind.config["vision_config"]
]
CASES = {
    "ci": [(TINY, family) for family in FAMILIES],
    "default": [(BASE, family) for family in ("llava", "llava_onevision", "paligemma")],
    "full": [(geometry, family) for geometry in (TINY, BASE) for family in FAMILIES],
}[SIZE]
ANYRES = ("llava_next", "llava_onevision")  # two tiles an image: the whole, and a grid of one


def configuration(family: str, geometry: Geometry) -> dict[str, Any]:
    """The family's configuration in tests/, with another vision tower; the language model stays tiny."""
    fields = dict(KINDS[family].config)
    listed = isinstance(fields["vision_config"]["image_size"], list)
    fields["vision_config"] = {
        **fields["vision_config"],
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "image_size": [geometry.image] * 2 if listed else geometry.image,
        "patch_size": [geometry.patch] * 2 if listed else geometry.patch,
    }
    fields["text_config"] = {**fields["text_config"], "hidden_size": geometry.projected}
    if "projection_dim" in fields:
        fields["projection_dim"] = geometry.projected
        fields["vision_config"]["projection_dim"] = geometry.projected
    if family in ANYRES:
        fields["image_grid_pinpoints"] = [[geometry.image] * 2]
    return fields


@dataclass(frozen=True)
class Setup:
    ours: nn.Module
    plain: list[nn.Module]  # of each expert
    inputs: dict[str, Tensor]
    expert: Tensor  # of each image
    expert_of_tile: Tensor

    def features(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Of each image, or of each tile where a tile is an image."""
        found = model.base_model.get_image_features(**self.inputs).pooler_output
        if len(found) == 1:  # Idefics3's, of a prompt
            found = found[0].unflatten(0, (BATCH, -1))
        return tuple(found)


@functools.lru_cache(maxsize=1)
def setup(geometry: Geometry, family: str) -> Setup:
    cls = getattr(transformers, KINDS[family].model)
    with uninitialised():
        model = cls(cls.config_class(**configuration(family, geometry))).eval()
    before = sum(p.numel() for p in model.parameters())
    ours = randomise(mixpertize(model, NUM_EXPERTS, geometry.cloned)).to(DEVICE, DTYPE)
    assert sum(p.numel() for p in ours.parameters()) == before + added_cost(ours).parameters
    plain = [unmixpertize(_sharing(ours), e) for e in range(NUM_EXPERTS)]

    generator, side = torch.Generator().manual_seed(0), geometry.image
    pixels = torch.randn(BATCH, 3, side, side, generator=generator).to(DEVICE, DTYPE)
    tiles = 2 if family in ANYRES else 1
    images = BATCH // tiles
    inputs = {"pixel_values": pixels}
    if family in ANYRES:
        inputs["pixel_values"] = pixels.unflatten(0, (images, tiles))
        inputs["image_sizes"] = torch.tensor([[side, side]] * images)
    if family in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = pixels[None]
    if "vision_feature_layer" in (fields := ours.config.to_dict()):
        inputs["vision_feature_layer"] = fields["vision_feature_layer"]
        inputs["vision_feature_select_strategy"] = fields.get("vision_feature_select_strategy")
    if family == "vipllava":
        del inputs["vision_feature_select_strategy"]
    expert = torch.arange(images, device=DEVICE) % NUM_EXPERTS
    return Setup(ours, plain, inputs, expert, expert.repeat_interleave(tiles))


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the model on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def ours(s: Setup) -> Callable[[], tuple[Tensor, ...]]:
    image_of_tile = torch.arange(BATCH) // (BATCH // len(s.expert))

    def call() -> tuple[Tensor, ...]:
        with forced_routing(s.ours, s.expert, image_of_tile=image_of_tile):
            return s.features(s.ours)

    return call


def plain(s: Setup) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: s.features(s.plain[0])


class Loop(nn.Module):
    """A block in whose place several run, each on its experts' tiles; of the block's class, for transformers' hooks."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        runs = [functools.partial(_run, block, args, kwargs) for block in self.of_expert]
        return baselines.per_group(runs, self.expert, x)


def _run(block: nn.Module, args: tuple, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return block.forward(x, *args, **kwargs)  # past transformers' hooks, which count blocks


def naive_loop(s: Setup) -> Callable[[], tuple[Tensor, ...]]:
    looped = _sharing(s.plain[0])
    for name, module in s.ours.named_modules():
        if hasattr(module, "mixpert_template"):
            place = looped.get_submodule(name)
            place.of_expert = [model.get_submodule(name) for model in s.plain]
            place.expert = s.expert_of_tile
            place.__class__ = type("Loop", (Loop, type(place)), {})
    return lambda: s.features(looped)


VARIANTS = (ours, plain, naive_loop)


def scenario(geometry: Geometry, family: str) -> Scenario:
    s = setup(geometry, family)

    def truth() -> tuple[Tensor, ...]:
        every = [s.features(model) for model in s.plain]
        by_tile = len(every[0]) == BATCH
        chosen = s.expert_of_tile if by_tile else s.expert
        return tuple(every[e][i] for i, e in enumerate(chosen.tolist()))

    def variant(make: Callable[[Setup], Callable[[], tuple[Tensor, ...]]]) -> Variant:
        own = (lambda: s.features(s.plain[0])) if make is plain else None
        return Variant(make.__name__, lambda: make(s), own)

    cost = added_cost(s.ours)
    return Scenario(
        name=f"vision side of {family}, {geometry.name}, {BATCH} tiles, {len(s.expert)} images",
        truth=truth,
        base="plain",
        variants=tuple(variant(make) for make in VARIANTS),
        info={
            "geometry": f"{family} {geometry.name}",
            "batch": BATCH,
            "route": "mixed",
            "bench": "mllm",
            "added_parameters": cost.parameters,
            "added_flop": cost.flop + cost.flop_per_token * geometry.tokens,
        },
    )


@pytest.mark.parametrize("variant", [make.__name__ for make in VARIANTS])
@pytest.mark.parametrize(
    ("geometry", "family"), CASES, ids=lambda value: getattr(value, "name", value)
)
def test_mllm(record: Callable[..., None], geometry: Geometry, family: str, variant: str) -> None:
    record(scenario, geometry, family, variant=variant)
