"""Where a multimodal model keeps its vision tower and projector, and how it tells one image's tiles from another's.

A family is a row of ``FAMILIES``, by ``config.model_type``. Paths are below the module that has
``get_image_features``, the owner.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixpert_kernels.hf.families import FAMILIES as TOWERS
from mixpert_kernels.hf.families import family_of

from .boundaries import Images, from_counts, from_grids, from_last_runs, from_runs
from .scope import prompt_of

Arguments = dict[str, Any]
Finder = Callable[[nn.Module, Arguments, Tensor], Images]  # owner, arguments of the call, x


@dataclass(frozen=True, eq=False)
class Mllm:
    """One architecture.

    Attributes:
        model: name of the class in transformers.
        tower: path of the vision tower.
        projector: path of the projector.
        images: by modality, what finds the images among the tiles of a call; None: a tile is an image.
        base: whether an image's ``first`` or ``last`` tile shows the whole of it.
        host: arguments that the model itself reads on the host: read once, they are passed on as CPU tensors.
        feature: name in the configuration of the hidden state, or states, that are the feature; None: the last one.
        blocks: path of the blocks below the tower; None: as hf/families.py has it for the tower's type.
        width: name in vision_config of the width of the blocks.
        packed: whether the tower takes the patches of all images as packed rows, which ``images`` then divides.
    """

    model: str
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    images: dict[str, Finder | None] = field(default_factory=lambda: {"image": None})
    base: str = "first"
    host: tuple[str, ...] = ()
    feature: str | None = "vision_feature_layer"
    blocks: str | None = None
    width: str = "hidden_size"
    packed: bool = False


def _anyres(owner: nn.Module, arguments: Arguments, x: Tensor) -> Images:
    """As many tiles as the owner's own code counts for an image of that size (LLaVA-NeXT, LLaVA-OneVision)."""
    plain = importlib.import_module(type(owner).__module__)
    sizes, prompts = arguments["image_sizes"], arguments.get("batch_num_images")
    split = [True] * len(sizes)
    if prompts is not None:  # only an image alone in its prompt is cut
        split = [int(n) == 1 for n in prompts for _ in range(int(n))]
    counts = [
        plain.image_size_to_num_patches(
            image_size=size,
            grid_pinpoints=owner.config.image_grid_pinpoints,
            patch_size=owner.config.vision_config.image_size,
        )
        if cut
        else 1
        for size, cut in zip(sizes, split, strict=False)
    ]
    return from_counts(counts, "first")


def _frames(owner: nn.Module, arguments: Arguments, x: Tensor) -> Images:
    videos, frames = arguments["pixel_values_videos"].shape[:2]
    return from_counts([frames] * videos, "first")


def _internvl(owner: nn.Module, arguments: Arguments, x: Tensor) -> Images:
    tokens = int((x.shape[1] - 1) * owner.config.downsample_ratio**2)
    return from_runs(_prompt(owner), owner.config.image_token_id, len(x), tokens)


def _idefics3(owner: nn.Module, arguments: Arguments, x: Tensor) -> Images:
    tokens = x.shape[1] // owner.config.scale_factor**2
    return from_last_runs(_prompt(owner), owner.config.image_token_id, len(x), tokens)


# Of what is called with packed rows: the argument that says whose they are. The last is the tower's own.
GRIDS = {
    "pixel_values": "image_grid_thw",
    "pixel_values_videos": "video_grid_thw",
    "hidden_states": "grid_thw",
}


def _grids(owner: nn.Module, arguments: Arguments, x: Tensor) -> Images:
    """One tile for each image, and for each video: its frames share a route (Qwen2-VL, Qwen2.5-VL)."""
    grids = next(arguments[name] for name in GRIDS.values() if name in arguments)
    return from_grids(grids.to(x.device))


def check_packed(arguments: Arguments) -> None:
    """Raise ValueError unless the packed rows of a call are those of its grids, whose values are read on a CPU alone.

    Before the tower, which would fail at it in words of its own.
    """
    for name, of in GRIDS.items():
        if name not in arguments:
            continue
        rows, grids = arguments[name], arguments.get(of)
        if not isinstance(grids, Tensor) or grids.shape[1:] != (3,) or grids.is_floating_point():
            got = (
                f"{tuple(grids.shape)}, {grids.dtype}" if isinstance(grids, Tensor) else str(grids)
            )
            raise ValueError(
                f"mixpertize: {of} must be (B, 3) integers, frames, rows and columns of patches, got {got}"
            )
        if grids.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        patches = int(grids.prod(-1).sum())
        if patches != len(rows):
            raise ValueError(
                f"mixpertize: {of} must have as many patches as {name} has rows, {len(rows)}, got {patches}"
            )


def _prompt(owner: nn.Module) -> Tensor:
    prompt = prompt_of(owner)
    if prompt is None:
        raise ValueError(
            f"mixpertize: {type(owner).__name__} must be called with input_ids, which tell one image's tiles from "
            "another's, or under forced_routing(model, image_of_tile=...), got neither"
        )
    return prompt


_IDEFICS3 = {
    "tower": "vision_model",
    "projector": "connector",
    "images": {"image": _idefics3},
    "base": "last",
    "feature": None,
}

_QWEN = {
    "tower": "visual",
    "projector": "visual.merger",
    "images": {"image": _grids, "video": _grids},
    "feature": None,
    "blocks": "blocks",
    "packed": True,
}

FAMILIES: dict[str, Mllm] = {
    "llava": Mllm("LlavaForConditionalGeneration"),
    "vipllava": Mllm("VipLlavaForConditionalGeneration"),
    "llava_next": Mllm(
        "LlavaNextForConditionalGeneration", images={"image": _anyres}, host=("image_sizes",)
    ),
    "llava_onevision": Mllm(
        "LlavaOnevisionForConditionalGeneration",
        images={"image": _anyres, "video": _frames},
        host=("image_sizes", "batch_num_images"),
    ),
    "paligemma": Mllm("PaliGemmaForConditionalGeneration", feature=None),
    "gemma3": Mllm("Gemma3ForConditionalGeneration", feature=None),
    "internvl": Mllm("InternVLForConditionalGeneration", images={"image": _internvl}, base="last"),
    "idefics3": Mllm("Idefics3ForConditionalGeneration", **_IDEFICS3),
    "smolvlm": Mllm("SmolVLMForConditionalGeneration", **_IDEFICS3),
    "qwen2_vl": Mllm("Qwen2VLForConditionalGeneration", width="embed_dim", **_QWEN),
    "qwen2_5_vl": Mllm("Qwen2_5_VLForConditionalGeneration", **_QWEN),
}

# Vision towers that keep tiles apart along dimension 0, all of one length.
TILED = (*TOWERS, "idefics3_vision", "smolvlm_vision")


def mllm_of(config: Any) -> Mllm:
    """Return the family of a multimodal model's configuration.

    Raises:
        ValueError: the model type is not listed, or its vision tower packs images; the message says what to add.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"mixpertize: model_type must be one of {', '.join(FAMILIES)}, got {kind}. A model whose "
            "get_image_features runs square tiles, or packed patches, through a tower and then a projector takes a row "
            f'of FAMILIES in mixpert_kernels/hf/mllm/families.py: "{kind}": Mllm("<class name>", tower="<path>", '
            'projector="<path>", images={"image": <function that returns Images, or None>}), and a configuration in '
            "tests/_mllms.py"
        )
    tower = config.vision_config.model_type
    if not FAMILIES[kind].packed and tower not in TILED:
        raise ValueError(
            f"mixpertize: vision_config must be of type {', '.join(TILED)}, got {tower}"
        )
    return FAMILIES[kind]


def feature_layers(config: Any, family: Mllm, total: int) -> int:
    """How many of the vision tower's blocks feed the feature, or the last of several features."""
    chosen = -1 if family.feature is None else getattr(config, family.feature)
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return max(layer % (total + 1) for layer in chosen)


def blocks_of(tower: nn.Module, family: Mllm) -> nn.ModuleList:
    return tower.get_submodule(family.blocks or family_of(tower).blocks)


def to_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
