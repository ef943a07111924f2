"""Vision models, towers and image preprocessing from a directory; nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .configuration import MixpertVisionConfig
from .tower import FusedMixpertTower

if TYPE_CHECKING:
    from PIL import Image

Preprocess = Callable[[Sequence["Image.Image"]], Tensor]  # images -> (B, 3, H, W) float32

ENCODERS = (
    "vision_model",
    "vision_tower",
)  # where dual encoders and multimodal LLMs keep their vision model
PROJECTORS = ("multi_modal_projector",)
UNUSED = ("head.", "pooler.", "post_layernorm.")  # may be missing: they come after the feature
LOCAL: dict[str, Any] = {
    "local_files_only": True,
    "trust_remote_code": False,
}  # nothing is downloaded
PREPROCESSING_FILES = ("preprocessor_config.json", "processor_config.json")


_NO_TOWER = {
    "vision": "a {} checkpoint; `mixpert convert` makes a tower of it",
    "mllm": "a {} checkpoint; `mixpert convert --tower` makes a tower of it",
    "mixpertized": "a mixpertized {}, which has its experts in place; `mixpert route` and `demo` take it",
}


def kind_of(caller: str, directory: Path | str) -> str:
    """What a checkpoint directory holds, by its configuration alone.

    Returns:
        ``tower``: a FusedMixpertTower; ``mixpertized``: a vision-language model with experts; ``mllm``: a plain
        vision-language model; ``vision``: anything else.

    Raises:
        ValueError: the directory is missing or has no configuration that transformers knows.
    """
    directory = directory_of(caller, directory)
    with one_line(caller, directory, "a transformers checkpoint"):
        return _kind(
            AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        )


def _kind(config: Any) -> str:
    if isinstance(config, MixpertVisionConfig):
        return "tower"
    if getattr(config, "mixpert", None) is not None:
        return "mixpertized"
    return "mllm" if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else "vision"


def load_vision_model(
    directory: Path | str, dtype: torch.dtype | str = "auto"
) -> tuple[Any, nn.Module | None]:
    """Load the vision model of a transformers checkpoint, and its projector where it has one.

    Args:
        directory: holds ``config.json`` and the weights of a vision model, of a dual encoder such as SiglipModel or
            CLIPModel, or of a multimodal LLM with a ``vision_tower``.
        dtype: of the loaded weights; ``"auto"`` keeps the checkpoint's.

    Returns:
        The vision model in eval mode, and the ``multi_modal_projector`` or None.

    Raises:
        ValueError: the directory is missing, is no checkpoint, lacks weights or holds no vision model.
    """
    directory = directory_of("load_vision_model", directory)
    with one_line("load_vision_model", directory, "a transformers vision checkpoint"):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if isinstance(config, MixpertVisionConfig):
            raise ValueError("it is a FusedMixpertTower already")
        if _kind(config) == "mixpertized":
            raise ValueError("it is a mixpertized model already")
        model, report = AutoModel.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    prefix = next((name for name in ENCODERS if hasattr(model, name)), "")
    vision = getattr(model, prefix) if prefix else model
    if getattr(vision, "main_input_name", None) != "pixel_values":
        raise ValueError(
            f"load_vision_model: directory must hold a vision model, got {config.model_type} in {directory}"
        )
    _refuse_missing(report["missing_keys"], prefix, directory)
    projector = next((getattr(model, name) for name in PROJECTORS if hasattr(model, name)), None)
    return vision.eval(), projector


def load_tower(directory: Path | str) -> FusedMixpertTower:
    """Load a saved tower for inference, in float32.

    Raises:
        ValueError: the directory is missing or holds no FusedMixpertTower.
    """
    directory = directory_of("load_tower", directory)
    with one_line("load_tower", directory, "a saved FusedMixpertTower"):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if not isinstance(config, MixpertVisionConfig):
            raise ValueError(_NO_TOWER[_kind(config)].format(config.model_type))
        tower = FusedMixpertTower.from_pretrained(directory, dtype=torch.float32)
    return tower.eval()


def random_siglip(
    *, hidden: int, intermediate: int, layers: int, heads: int, image_size: int, patch_size: int
) -> Any:
    """A SigLIP vision model with random weights, drawn from torch's default generator."""
    config = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    return SiglipVisionModel(config).eval()


def load_preprocessing(directory: Path | str | None, vision_config: Any) -> Preprocess:
    """Return the function that turns images into the model's pixels, with Pillow alone (no torchvision).

    Args:
        directory: where ``preprocessor_config.json`` (or a ``processor_config.json``) may be. Without one, images are
            resized to the model's size and scaled to -1..1, as SigLIP does.
        vision_config: the vision model's configuration, for its ``image_size``.

    Raises:
        ValueError: the file is there and cannot be used.
    """
    size = getattr(vision_config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    settings = None if directory is None else _preprocessing_settings(Path(directory))
    if directory is None or settings is None:
        settings = {
            "size": {"height": height, "width": width},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        processor = transformers.SiglipImageProcessorPil(**settings)
    else:
        with one_line("load_preprocessing", directory, "a usable preprocessor_config.json"):
            processor = _processor(Path(directory), settings)

    def preprocess(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([_pixels(processor, image) for image in images])

    return preprocess


def _pixels(processor: Any, image: Image.Image) -> Tensor:
    pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    if (
        pixels.ndim == 5
    ):  # (1, tiles, 3, H, W) of an AnyRes processor: the base tile, which decides the route
        pixels = pixels[:, 0]
    if pixels.ndim != 4:
        raise ValueError(
            f"preprocess: {type(processor).__name__} must give pixel_values (B, 3, H, W), got {tuple(pixels.shape)}"
        )
    return pixels[0].float()


def _preprocessing_settings(directory: Path) -> dict[str, Any] | None:
    for name in PREPROCESSING_FILES:
        path = directory / name
        if not path.is_file():
            continue
        with one_line("load_preprocessing", path, "valid JSON"):
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings = settings.get("image_processor", settings)
        if "size" in settings or "image_mean" in settings:
            return settings
    return None


def _processor(directory: Path, settings: dict[str, Any]) -> Any:
    if settings.keys() & {"image_processor_type", "feature_extractor_type"}:
        return AutoImageProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True, trust_remote_code=False
        )
    size = settings.get("size")
    cropped = isinstance(size, int) or "shortest_edge" in (size or {})
    kind = transformers.CLIPImageProcessorPil if cropped else transformers.SiglipImageProcessorPil
    return kind(**settings)


def _refuse_missing(keys: Sequence[str], prefix: str, directory: Path) -> None:
    """transformers fills missing weights with random numbers and a warning: here it is an error."""
    start = f"{prefix}." if prefix else ""
    local = sorted(key.removeprefix(start) for key in keys if key.startswith(start))
    missing = [key for key in local if not any(part in key for part in UNUSED)]
    if missing:
        raise ValueError(
            f"load_vision_model: directory must hold all weights, got {directory} without {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )


def directory_of(caller: str, directory: Path | str) -> Path:
    """A directory with a ``config.json``; ValueError for any other."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{caller}: directory must exist, got {directory}")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{caller}: directory must hold config.json, got {directory}")
    return directory


@contextlib.contextmanager
def one_line(caller: str, path: Path | str, wanted: str) -> Iterator[None]:
    """Turn whatever a loader raises (OSError, KeyError, safetensors' own) into one line that names the path."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{caller}: {path} must be {wanted}, got: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and loading bars: a command line prints its own."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
