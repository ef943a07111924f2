"""Photographs: which handwritten digit was pasted into the crop."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

from .styles import SOURCES

SIDE = 32
LABELS = tuple("0123456789")
SCALES = (1.0, 0.5, 0.25)  # of the photographs that crops are taken from


def draw_photo(label: int, rng: np.random.Generator, split: str) -> Image.Image:
    """Paste a digit ``label`` of ``split`` into a crop of one of its photographs: 32 x 32 pixels RGB."""
    back = crop(rng, split).astype(np.float32)
    digits = _digits(split)[label]
    digit = Image.fromarray(digits[int(rng.integers(len(digits)))])
    side = int(rng.integers(25, 31))
    digit = digit.resize((side, side), Image.Resampling.BICUBIC)
    digit = digit.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    alpha = np.zeros((SIDE, SIDE, 1), np.float32)
    top, left = rng.integers(0, SIDE - side + 1, 2)
    alpha[top : top + side, left : left + side, 0] = np.asarray(digit, np.float32) / 255
    under = float((back * alpha).sum() / (3 * alpha.sum() + 1e-6))
    ink = rng.uniform(200, 255, 3) if under < 128 else rng.uniform(0, 55, 3)
    pixels = back * (1 - alpha) + ink.astype(np.float32) * alpha
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def crop(rng: np.random.Generator, split: str, side: int = SIDE) -> np.ndarray:
    """A crop (side, side, 3) uint8 of one of the photographs of ``split``, relit and perhaps mirrored; at most 64."""
    names = SOURCES[split].photos
    levels = _pyramid(names[int(rng.integers(len(names)))])
    image = levels[int(rng.integers(len(levels)))]
    top = int(rng.integers(0, image.shape[0] - side + 1))
    left = int(rng.integers(0, image.shape[1] - side + 1))
    part = image[top : top + side, left : left + side].astype(np.float32)
    part = part if rng.random() < 0.5 else part[:, ::-1]
    contrast, light = rng.uniform(0.1, 0.4), rng.uniform(-40, 40)
    return ((part - 128) * contrast + 128 + light).clip(0, 255).astype(np.uint8)


@cache
def _pyramid(name: str) -> list[np.ndarray]:
    owner, _, file = name.rpartition("/")
    folder = files("sklearn") / "datasets" / "images" if owner else files("skimage") / "data"
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"reproduce: {owner or 'scikit-image'} must ship {file}")
    with Image.open(str(path)) as image:
        image = image.convert("RGB")
    sizes = [(int(image.width * s), int(image.height * s)) for s in SCALES]
    sizes = [size for size in sizes if min(size) >= 2 * SIDE]
    return [np.asarray(image.resize(size, Image.Resampling.BOX)) for size in sizes]


@cache
def _digits(split: str) -> list[np.ndarray]:
    """The digits of ``split``: one array (n, 8, 8) uint8 a label."""
    from sklearn.datasets import load_digits

    data = load_digits()
    own = np.isin(np.arange(len(data.images)) % 8, SOURCES[split].digits)
    images = (data.images * (255 / 16)).astype(np.uint8)
    return [images[own & (data.target == label)] for label in range(10)]
