"""The routes of single images by a mixpertized model on disk, of which only the vision side is loaded and run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, PreTrainedModel

from mixpert_kernels.hf.loading import PREPROCESSING_FILES, directory_of, one_line

from .blocks import subclass
from .families import mllm_of
from .mixpertize import build
from .routes import forced_routing, record_routing
from .saving import refuse_faults
from .scope import Record
from .settings import Settings

if TYPE_CHECKING:
    from PIL import Image

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class VisionSide(nn.Module):
    """What loads a mixpertized model without its language model: whose weights are not even read."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.__class__ = type(self).mixpert_plain
        build(self, Settings.of(config.mixpert))
        owner, language = self.base_model, self.get_decoder()
        heads = [name for name, child in self.named_children() if child is not owner]
        (words,) = [name for name, child in self.named_modules() if child is language]
        for name in (*heads, words):
            self.set_submodule(name, nn.Identity())
            self._keys_to_ignore_on_load_unexpected.add(rf"^{re.escape(name)}\.")
        self.all_tied_weights_keys = {}


def load_vision_side(directory: Path | str) -> PreTrainedModel:
    """Load the vision tower, the projector and the router of a mixpertized model, for inference in float32.

    Returns:
        The model; ``get_image_features`` of its ``base_model`` is all that can be called.

    Raises:
        ValueError: the directory is missing or holds no mixpertized model, or one that lacks a parameter.
    """
    caller = "load_vision_side"
    directory = directory_of(caller, directory)
    with one_line(caller, directory, "a mixpertized vision-language model"):
        config = AutoConfig.from_pretrained(directory, **LOCAL)
        if getattr(config, "mixpert", None) is None:
            raise ValueError(f"a plain {config.model_type}; `mixpert convert` gives it experts")
        made = subclass(getattr(transformers, mllm_of(config).model), VisionSide)
        model, info = made.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **LOCAL,
        )
    refuse_faults(caller, directory, "mixpertized model", info)
    return model.eval()


class ImageReader:
    """A checkpoint's image processor, with Pillow alone, as its processor for images and text calls it.

    Args:
        directory: the checkpoint's.

    Raises:
        ValueError: it holds no image processor, or one that cannot be used.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = directory_of("ImageReader", directory)
        if not any((directory / name).is_file() for name in PREPROCESSING_FILES):
            raise ValueError(
                f"ImageReader: directory must hold {' or '.join(PREPROCESSING_FILES)}, which say how images are read, "
                f"got {directory} without: copy them from the model it was made from"
            )
        with one_line("ImageReader", directory, "a checkpoint with a usable image processor"):
            config = AutoConfig.from_pretrained(directory, **LOCAL)
            self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **LOCAL)
        whole = PROCESSOR_MAPPING.get(type(config), None)
        self.options = getattr(whole, "images_kwargs", {})  # InternVL's asks for crops

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        """What the image processor makes of one image."""
        return dict(self.processor(images=[image], return_tensors="pt", **self.options))


@torch.inference_mode()
def route_image(model: PreTrainedModel, inputs: dict[str, Any]) -> Record:
    """Route one image, all its tiles together, without the language model.

    Args:
        model: a mixpertized model, or its vision side.
        inputs: what ``ImageReader`` made of the image.

    Returns:
        The routing: ``expert`` (1,) and ``scores`` (1, E).
    """
    owner = model.base_model
    taken = inspect.signature(owner.get_image_features).parameters
    given = {name: _on(owner.device, value) for name, value in inputs.items() if name in taken}
    pixels = inputs["pixel_values"]
    # Tiles (..., C, H, W) are all of this image; packed patches (R, C) are of the images that the model counts.
    crops = [0] * pixels.shape[:-3].numel() if pixels.ndim > 3 else None
    with forced_routing(model, image_of_tile=crops), record_routing(model) as records:
        owner.get_image_features(**given)
    return records[0]


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
