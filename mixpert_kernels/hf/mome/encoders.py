"""Frozen transformers vision models as what a branch of MoVE takes: packed rows of patches, their grids, and a CLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from mixpert_kernels.grids import Grids
from mixpert_kernels.hf.loading import LOCAL, directory_of, one_line, quiet
from mixpert_kernels.modules.move import Features

UNUSED = ("head.", "pooler.", "post_layernorm.")  # may be missing: they come after the feature


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        model: name of the class in transformers.
        cls: whether the first token is of the whole image.
        registers: name in the configuration of how many tokens follow that are of no patch.
        normed: whether what it returns is behind the last LayerNorm.
        cut: whether the feature is what the blocks give, before that LayerNorm, in whose place the branch has one: EVA.
        packed: whether it takes flattened patches, as Pix2Struct does, and each image has a grid of its own.
    """

    model: str
    cls: bool = True
    registers: str | None = None
    normed: bool = True
    cut: bool = False
    packed: bool = False


KINDS = {
    "clip_vision_model": Kind("CLIPVisionModel", normed=False),
    "blip_2_vision_model": Kind("Blip2VisionModel", normed=False, cut=True),
    "instructblip_vision_model": Kind("InstructBlipVisionModel", normed=False, cut=True),
    "siglip_vision_model": Kind("SiglipVisionModel", cls=False),
    "dinov2": Kind("Dinov2Model"),
    "dinov2_with_registers": Kind("Dinov2WithRegistersModel", registers="num_register_tokens"),
    "vit": Kind("ViTModel"),
    "pix2struct_vision_model": Kind("Pix2StructVisionModel", cls=False, packed=True),
}
# Larger models, and where they keep one of these.
OWNERS = {
    "clip": "vision_model",
    "blip-2": "vision_model",
    "instructblip": "vision_model",
    "siglip": "vision_model",
    "pix2struct": "encoder",
}


class Encoder(nn.Module):
    """A transformers vision model that is frozen and stays in eval mode.

    Args:
        model: CLIP's, EVA's (of BLIP-2 and InstructBLIP), SigLIP's, DINOv2's with or without registers, ViT, or
            Pix2Struct's encoder; or a model that has one of these, of which the rest is left out.

    Attributes:
        width: C.
        has_cls: whether ``Features.cls`` is there.
        grid: rows and columns of patches at the size of the configuration; None where images differ.

    Raises:
        ValueError: a model of another type.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        owned = OWNERS.get(_type_of(model))
        model = getattr(model, owned) if owned else model
        self.kind = _kind(_type_of(model))
        self.model = model.eval().requires_grad_(False)
        if self.kind.packed:
            # Row and column ids reach 2048 and must stay float32, in which they come, beside weights of any dtype.
            model.embeddings.patch_projection.register_forward_pre_hook(_in_its_dtype)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def has_cls(self) -> bool:
        return self.kind.cls

    @property
    def grid(self) -> tuple[int, int] | None:
        if self.kind.packed:
            return None
        sides = zip(_pair(self.model.config.image_size), self._patch, strict=True)
        height, width = (size // patch for size, patch in sides)
        return height, width

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode: the features are those that the encoder was trained to give."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | None = None,  # (B, 3, height, width)
        *,
        flattened_patches: Tensor | None = None,  # (B, S, 2 + K)
        attention_mask: Tensor | None = None,  # (B, S)
    ) -> Features:
        """Encode images as the encoder's own image processor made them.

        Without gradient. Inputs are moved to the encoder's device; Pix2Struct's are best left on the CPU, as the grids
        are read from them by the host, which would wait for a GPU.

        Args:
            pixel_values: of all encoders but Pix2Struct. Sides other than the configuration's interpolate the position
                embeddings.
            flattened_patches: of Pix2Struct: row and column from 1, then the pixels; each image's in row-major order.
            attention_mask: of Pix2Struct: 1 for a patch, 0 for padding.

        Returns:
            The patches (R, C), their grids, and the CLS token (B, C) where the model has one.

        Raises:
            ValueError: inputs of another kind or shape, or patches that are no grid.
        """
        if self.kind.packed:
            return self._packed(flattened_patches, attention_mask)
        return self._tiled(pixel_values)

    @property
    def _patch(self) -> tuple[int, int]:
        return _pair(self.model.config.patch_size)

    def _tiled(self, pixels: Tensor | None) -> Features:
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            self._refuse("pixel_values must be (B, 3, height, width)", pixels)
        like = next(self.model.parameters())
        pixels = pixels.to(like.device, like.dtype, non_blocking=True)
        height, width = (n // p for n, p in zip(pixels.shape[-2:], self._patch, strict=True))
        resized = {} if (height, width) == self.grid else {"interpolate_pos_encoding": True}
        if self.kind.model.startswith("Dinov2"):
            resized = {}  # which it does without being told
        if self.kind.cut:
            embedded = self.model.embeddings(pixels, **resized)
            hidden = self.model.encoder(inputs_embeds=embedded).last_hidden_state
        else:
            hidden = self.model(pixel_values=pixels, **resized).last_hidden_state
        first = self.kind.cls + getattr(self.model.config, self.kind.registers or "", 0)
        batch = len(hidden)
        return Features(
            hidden[:, first:].reshape(batch * height * width, -1),
            Grids.same(batch, height, width, hidden.device),
            hidden[:, 0] if self.kind.cls else None,
        )

    def _packed(self, patches: Tensor | None, mask: Tensor | None) -> Features:
        if not isinstance(patches, Tensor) or patches.ndim != 3:
            self._refuse("flattened_patches must be (B, S, 2 + K)", patches)
        if not isinstance(mask, Tensor) or mask.shape != patches.shape[:2]:
            self._refuse(f"attention_mask must be {tuple(patches.shape[:2])}", mask)
        sizes, inside = grids_of(patches, mask)
        device = self.model.device
        hidden = self.model(
            flattened_patches=patches.to(device, torch.float32, non_blocking=True),
            attention_mask=mask.to(device, non_blocking=True),
        ).last_hidden_state
        kept = inside.flatten().nonzero().flatten()  # (R,)
        if device.type == "cuda":
            kept = kept.pin_memory()  # so that the copy need not wait for the stream
        rows = hidden.flatten(0, 1).index_select(0, kept.to(device, non_blocking=True))
        return Features(rows, Grids.of(sizes, device), None)

    def _refuse(self, condition: str, got: Any) -> NoReturn:
        found = tuple(got.shape) if isinstance(got, Tensor) else got
        raise ValueError(f"mome: {self.kind.model}'s {condition}, got {found}")


def grids_of(
    patches: Tensor,  # (B, S, 2 + K)
    mask: Tensor,  # (B, S)
) -> tuple[list[tuple[int, int]], Tensor]:
    """Read H and W of each image from the ids of its patches.

    Returns:
        The sizes, and which of the (B, S) patches are an image's own, on the CPU.

    Raises:
        ValueError: the patches of an image are not those of a grid, row by row.
    """
    ids, mask = patches[..., :2].cpu().long(), mask.cpu().bool()
    rows, columns = (ids * mask[..., None]).amax(1).clamp(min=1).unbind(1)  # (B,) each
    place = torch.arange(mask.shape[1])
    inside = place < (rows * columns)[:, None]
    width = columns[:, None]
    expected = torch.stack([place // width + 1, place % width + 1], -1)
    fits = (mask == inside).all(1) & ((ids == expected).all(-1) | ~inside).all(1)
    for b, (fit, row, column, n) in enumerate(
        zip(*(t.tolist() for t in (fits, rows, columns, mask.sum(1))), strict=True)
    ):
        if not fit or n != row * column:
            raise ValueError(
                f"mome: flattened_patches must begin with the H x W patches of each image, row by row, and "
                f"attention_mask be 1 for these, got {n} patches for image {b} whose ids reach {row} x {column}"
            )
    return list(zip(rows.tolist(), columns.tolist(), strict=True)), inside


def load_encoder(directory: Path | str, dtype: torch.dtype | str = "auto") -> Encoder:
    """Load the vision model of a transformers checkpoint; the rest of a larger one is not read.

    Raises:
        ValueError: the directory is missing, is no checkpoint, holds no vision model of a known type, or one that
            lacks a parameter.
    """
    caller = "load_encoder"
    directory = directory_of(caller, directory)
    with quiet(), one_line(caller, directory, "a checkpoint of a vision encoder"):
        config = AutoConfig.from_pretrained(directory, **LOCAL)
        owned = OWNERS.get(config.model_type)
        config = config.vision_config if owned else config
        made = getattr(transformers, _kind(config.model_type).model)
        model, report = made.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            key_mapping={rf"^{owned}\.": ""} if owned else None,
            output_loading_info=True,
            **LOCAL,
        )
        missing = [k for k in report["missing_keys"] if not any(part in k for part in UNUSED)]
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing)[:3])}")
    return Encoder(model)


def _type_of(model: Any) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind or type(model).__name__


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(
            f"mome: encoder must be of type {', '.join([*KINDS, *OWNERS])}, got {name}. Any other takes a row of KINDS "
            "in mixpert_kernels/hf/mome/encoders.py, or is given as a module that returns Features"
        )
    return KINDS[name]


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _in_its_dtype(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype),)
