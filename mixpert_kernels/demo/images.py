"""The demo's images: an evaluation set of three domains and a training set that shares none of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mixpert_kernels.training.data import SUFFIXES

DOMAINS = ("photo", "chart", "document")


class Sample(NamedTuple):
    """An image, what to call it, and its domain (None when nobody says)."""

    name: str
    domain: str | None
    image: Image.Image


def evaluation_set(seed: int = 0) -> list[Sample]:
    """The images to route: 8 photographs, 10 charts, 8 documents and 2 scanned documents."""
    from mixpert_kernels.demo import charts, documents, photos

    rng = np.random.default_rng((seed, 1))
    groups = (
        ("photo", photos.evaluation_photos()),
        ("chart", charts.evaluation_charts(rng)),
        ("document", documents.evaluation_documents(rng) | photos.evaluation_scans()),
    )
    return [
        Sample(name, domain, image) for domain, group in groups for name, image in group.items()
    ]


def training_set(per_domain: int = 80, seed: int = 0) -> list[Sample]:
    """Other images of the same domains: other sources, other random numbers, other fonts and palettes."""
    from mixpert_kernels.demo import charts, documents, photos

    rng = np.random.default_rng((seed, 0))
    makers = (photos.training_photo, charts.training_chart, documents.training_document)
    steps = [
        (domain, make, i)
        for domain, make in zip(DOMAINS, makers, strict=True)
        for i in range(per_domain)
    ]
    bar = tqdm(steps, desc="drawing training images", unit="image", leave=False, delay=1)
    return [Sample(f"{domain}-{i}", domain, make(i, rng)) for domain, make, i in bar]


def open_image(path: Path | str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        ValueError: the file is missing or is not an image Pillow can read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image: path must name a file, got {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {path} must be a readable image, got {error}") from error


def image_files(folder: Path | str) -> list[Path]:
    """The image files of a folder, sorted by name.

    Raises:
        ValueError: the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: folder must be an existing directory, got {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"images: folder must hold image files ({', '.join(SUFFIXES)}), got {folder}"
        )
    return paths


def folder_set(folder: Path | str) -> list[Sample]:
    """A user's own images, of no known domain."""
    return [Sample(path.stem, None, open_image(path)) for path in image_files(folder)]


def fingerprint(image: Image.Image) -> str:
    """A hash of the pixels, to tell whether two images are the same."""
    return hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).hexdigest()
