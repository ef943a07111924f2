"""Images as each branch's encoder takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor

from mixpert_kernels.hf.loading import LOCAL, PREPROCESSING_FILES, one_line, quiet

if TYPE_CHECKING:
    from PIL import Image

ImageProcessor = Callable[..., Mapping[str, Any]]


class Processor:
    """One callable for the image processors of all branches.

    Args:
        processors: by branch, a transformers image processor or what is called like one,
            ``processor(images=[...], return_tensors="pt")``.

    Example:
        >>> import torch
        >>> processor = Processor(
        ...     {"clip": lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 3, 8, 8)}}
        ... )
        >>> processor(["an image"])["clip"]["pixel_values"].shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, processors: Mapping[str, ImageProcessor]) -> None:
        self.processors = dict(processors)

    def __call__(self, images: Sequence[Image.Image] | Image.Image) -> dict[str, dict[str, Any]]:
        """Process images.

        Args:
            images: B images, or one.

        Returns:
            By branch, its encoder's inputs: the ``images`` of a model, on the CPU.

        Raises:
            ValueError: no image.
        """
        every = list(images) if isinstance(images, Sequence) else [images]
        if not every:
            raise ValueError("Processor: images must hold at least one, got none")
        return {
            name: dict(processor(images=every, return_tensors="pt"))
            for name, processor in self.processors.items()
        }


def load_image_processor(directory: Path) -> ImageProcessor | None:
    """The image processor beside a checkpoint, with Pillow alone; None where there is none.

    Pix2Struct's renders no question into the image: the instruction goes to the routers and the LLM.

    Raises:
        ValueError: it cannot be used.
    """
    if not any((directory / name).is_file() for name in PREPROCESSING_FILES):
        return None
    wanted = "a checkpoint with a usable image processor"
    with quiet(), one_line("load_image_processor", directory, wanted):
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **LOCAL)
    if getattr(processor, "is_vqa", False):
        processor.is_vqa = False
    return processor
