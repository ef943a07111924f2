"""The images of the comparisons: rendered once a seed, kept as one uint8 array a part in the output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import charts, documents, photos
from .ambiguous import AMBIGUOUS
from .styles import SPLITS

DOMAINS = ("photo", "chart", "document")
EXPERTS = ("versatile", *DOMAINS)
SIDE = 32
CLASSES = 10  # a domain
CHUNK = 1000  # images rendered at a time
MAKERS: dict[str, tuple[Callable, str]] = {
    "photo": (photos.draw_photo, "photo"),
    "chart": (charts.draw_chart, "chart"),
    "document": (documents.draw_document, "document"),
    **AMBIGUOUS,
}
DOMAIN_LABELS = {"photo": photos.LABELS, "chart": charts.LABELS, "document": documents.LABELS}
LABELS = tuple(f"{domain}: {label}" for domain in DOMAINS for label in DOMAIN_LABELS[domain])


class Part(NamedTuple):
    """The images of one kind in one split.

    Attributes:
        kind: a domain, or a kind of ambiguous images.
        split: ``train``, ``held_out`` or ``test``.
        size: how many images.
    """

    kind: str
    split: str
    size: int

    def path(self, folder: Path, seed: int) -> Path:
        name = f"{self.split}-{self.kind.replace(' ', '-')}-{self.size}"
        return folder / f"seed-{seed}" / f"{name}.npy"


class Images(NamedTuple):
    """Images with their answers.

    Attributes:
        pixels: (N, 3, 32, 32) uint8.
        labels: (N,) int64, of the union of all domains' labels.
        domain: (N,) int64: the expert that serves their domain, 1 to 3.
    """

    pixels: Tensor
    labels: Tensor
    domain: Tensor

    def select(self, index: Tensor | slice) -> Images:
        """Some of the images."""
        return Images(self.pixels[index], self.labels[index], self.domain[index])


def render(kind: str, split: str, seed: int, index: int) -> np.ndarray:
    """Image ``index`` of a kind, split and seed, always the same: (32, 32, 3) uint8. Its answer is index % 10.

    Raises:
        ValueError: the kind or split is not known.
    """
    if kind not in MAKERS:
        raise ValueError(f"render: kind must be one of {', '.join(MAKERS)}, got {kind}")
    if split not in SPLITS:
        raise ValueError(f"render: split must be one of {', '.join(SPLITS)}, got {split}")
    rng = np.random.default_rng((seed, SPLITS.index(split), list(MAKERS).index(kind), index))
    image = MAKERS[kind][0](index % CLASSES, rng, split)
    return np.asarray(image if image.width == SIDE else image.reduce(image.width // SIDE))


def render_part(folder: Path, part: Part, seed: int) -> Iterator[int]:
    """Render a part into its file, yielding how many images came to be; nothing if it is there already."""
    path = part.path(folder, seed)
    if path.is_file():
        yield part.size
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.empty((part.size, 3, SIDE, SIDE), np.uint8)
    for first in range(0, part.size, CHUNK):
        indices = range(first, min(first + CHUNK, part.size))
        for i in indices:
            pixels[i] = render(part.kind, part.split, seed, i).transpose(2, 0, 1)
        yield len(indices)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with open(draft, "wb") as file:
        np.save(file, pixels)
    os.replace(draft, path)


def load(folder: Path, part: Part, seed: int) -> Images:
    """The images of a part that ``render_part`` wrote."""
    pixels = torch.from_numpy(np.load(part.path(folder, seed)))
    domain = DOMAINS.index(MAKERS[part.kind][1])
    labels = torch.arange(len(pixels)) % CLASSES + domain * CLASSES
    return Images(pixels, labels, torch.full_like(labels, domain + 1))


def join(parts: list[Images]) -> Images:
    return Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def as_input(pixels: Tensor) -> Tensor:
    """uint8 images as a model takes them: float32, -1..1."""
    return pixels.float().div_(127.5).sub_(1)


def write_folder(root: Path, images: int, seed: int) -> Iterator[int]:
    """Write ``images`` a domain and split as PNG files, root/SPLIT/DOMAIN/LABEL/NUMBER.png.

    Yields how many were written since the last time.
    """
    for split in SPLITS:
        for domain in DOMAINS:
            for i in range(images):
                label = DOMAIN_LABELS[domain][i % CLASSES].replace(" ", "-")
                path = root / split / domain / label / f"{i:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render(domain, split, seed, i)).save(path)
                yield 1
