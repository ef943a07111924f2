"""Where the blocks of a transformers vision model are, and what stands before and after them.

A family is a row of ``FAMILIES``, by ``config.model_type``. A model of another type is served all the same if it has
one list of ``config.num_hidden_layers`` blocks; a row is needed only to embed without running the model's own forward,
and to know its final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

_MASK = (None,)  # blocks that take an attention mask take it by position
Call = tuple[
    Tensor, tuple, dict[str, Any]
]  # what the first block is called with: x (B, T, D), args, kwargs


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        blocks: path of the list of blocks.
        embed: (model, pixel_values, interpolate) to what the first block is called with.
        final_norm: path of the norm after the blocks; None if unknown.
        drop: modules after the blocks that a tower does not need.
        any_size: whether the model interpolates its positions by itself.
        args: what its blocks are called with besides x, where ``embed`` has not been asked.
    """

    blocks: str
    embed: Callable[[nn.Module, Tensor, bool], Call]
    final_norm: str | None = None
    drop: tuple[str, ...] = ()
    any_size: bool = False
    args: tuple = ()


def _siglip(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    return model.embeddings(pixels, interpolate_pos_encoding=interpolate), _MASK, {}


def _siglip2(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    """Siglip2VisionModel takes patches: cut square images as its image processor does."""
    size = model.config.patch_size
    batch, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    patches = pixels[..., : rows * size, : columns * size]
    patches = patches.view(batch, channels, rows, size, columns, size)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    shapes = torch.tensor([[rows, columns]]).expand(batch, 2)
    return model.embeddings(patches, shapes), _MASK, {}


def _clip(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    x = model.embeddings(pixels, interpolate_pos_encoding=interpolate)
    return model.pre_layrnorm(x), _MASK, {}


def _vit(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    return model.embeddings(pixels, interpolate_pos_encoding=interpolate), (), {}


def _plain(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    return model.embeddings(pixels), (), {}


def _dinov3(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    x = model.embeddings(pixels)
    return x, (), {"position_embeddings": model.rope_embeddings(pixels)}


_SIGLIP = {"blocks": "encoder.layers", "final_norm": "post_layernorm", "drop": ("head",)}
_DINOV2 = Family("encoder.layer", _plain, "layernorm", any_size=True)

FAMILIES: dict[str, Family] = {
    "siglip_vision_model": Family(embed=_siglip, args=_MASK, **_SIGLIP),
    "siglip2_vision_model": Family(embed=_siglip2, args=_MASK, **_SIGLIP),
    "clip_vision_model": Family("encoder.layers", _clip, "post_layernorm", args=_MASK),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "vit": Family("layers", _vit, "layernorm", ("pooler",)),
    "dinov3_vit": Family("model.layer", _dinov3, "norm", any_size=True),
    "internvl_vision": Family("encoder.layer", _plain, "layernorm"),
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformers vision model.

    Raises:
        ValueError: the model type is not listed and no list of blocks is found; the message lists the supported ones.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "FusedMixpertTower: vision_model must be a transformers model, got a "
            f"{type(model).__name__}"
        )
    row = FAMILIES.get(model.config.model_type)
    return _unlisted(model) if row is None else row


def cut(model: nn.Module, family: Family, layers: int) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model with its first ``layers`` blocks, and the blocks after them.

    The cut model shares parameters with ``model``, which is not changed: only the modules on the way to the list of
    blocks are new.
    """
    blocks = list(model.get_submodule(family.blocks))
    shell = _with_blocks(model, family.blocks, blocks[:layers])
    for name in family.drop:
        if name in shell._modules:
            shell._modules[name] = None
    return shell, blocks[layers:]


def _with_blocks(model: nn.Module, where: str, blocks: list[nn.Module]) -> nn.Module:
    """The model with other blocks at ``where``: new module objects on the way there, all else the same ones."""
    shell = owner = _shell(model)
    *path, last = where.split(".")
    for name in path:
        owner._modules[name] = _shell(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[last] = nn.ModuleList(blocks)
    return shell


def _shell(module: nn.Module) -> nn.Module:
    """A copy of the module object alone: its children and parameters are the same objects."""
    shell = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[table] = dict(module.__dict__[table])
    return shell


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return a copy of a vision configuration with another number of layers."""
    fields = config.to_dict()
    for stage in ("stage_names", "out_features", "out_indices"):  # backbones list their layers
        fields.pop(stage, None)
    fields["num_hidden_layers"] = layers
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


class _Caught(Exception):
    """Carries what the first block was called with out of a model's forward."""


class _Catch(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _Caught(args, kwargs)


def _unlisted(model: nn.Module) -> Family:
    layers = getattr(model.config, "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and len({_layout(block) for block in module}) == 1
    ]
    if len(found) != 1:
        raise ValueError(
            "FusedMixpertTower: vision_model must have exactly one list of config.num_hidden_layers blocks or be of "
            f"type {', '.join(sorted(FAMILIES))}, got {getattr(model.config, 'model_type', None)} "
            f"({type(model).__name__})"
        )
    return Family(found[0], _embed_by_running(found[0]), any_size=True)


def _layout(block: nn.Module) -> tuple:
    """What the blocks of one list share, and the stages of a pyramid do not."""
    return type(block), *((name, p.shape) for name, p in block.named_parameters())


def _embed_by_running(blocks: str) -> Callable[[nn.Module, Tensor, bool], Call]:
    """Run the model's own forward up to its first block, and return what that was called with."""

    def embed(model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
        probe = _with_blocks(model, blocks, [_Catch()])
        try:
            probe(pixels)
        except _Caught as caught:
            args, kwargs = caught.args
            if not args:
                return kwargs.pop("hidden_states"), (), kwargs
            return args[0], args[1:], kwargs
        raise RuntimeError(f"FusedMixpertTower: {type(model).__name__} never called its blocks")

    return embed
