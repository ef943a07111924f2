"""Photographs and scans that scikit-image's and matplotlib's wheels carry: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

PHOTOS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "camera": "camera.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "coins": "coins.png",
    "clock": "clock_motion.png",
}
SCANS = {"page": "page.png", "text": "text.png"}
TRAINING_SOURCES = (
    "brick.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "cell.png",
    "ihc.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
)
HOPPER_EVERY = 3  # one training crop in three shows the only ordinary photograph left for training


def _skimage_file(name: str) -> Image.Image:
    path = files("skimage") / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"demo: scikit-image must ship data/{name}, tested with 0.26")
    with Image.open(str(path)) as image:
        return image.convert("RGB")


@cache
def _training_sources() -> tuple[Image.Image, ...]:
    import matplotlib

    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(hopper) as image:
        return (image.convert("RGB"), *(_skimage_file(name) for name in TRAINING_SOURCES))


def evaluation_photos() -> dict[str, Image.Image]:
    """The eight ordinary photographs of scikit-image's wheel, by name."""
    return {name: _skimage_file(file) for name, file in PHOTOS.items()}


def evaluation_scans() -> dict[str, Image.Image]:
    """The two scanned documents of scikit-image's wheel, by name."""
    return {name: _skimage_file(file) for name, file in SCANS.items()}


def training_photo(index: int, rng: np.random.Generator) -> Image.Image:
    """A random crop of a texture, a science image or matplotlib's grace_hopper.jpg, relit and tinted."""
    hopper, *others = _training_sources()
    image = hopper if index % HOPPER_EVERY == 0 else others[index % len(others)]
    side = int(min(image.size) * rng.uniform(0.35, 1.0))
    left = int(rng.integers(0, image.width - side + 1))
    top = int(rng.integers(0, image.height - side + 1))
    crop = image.crop((left, top, left + side, top + side))
    crop = crop.resize((256, 256), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    if rng.random() < 0.3:
        crop = ImageOps.grayscale(crop).convert("RGB")
    elif rng.random() < 0.5:
        crop = _tinted(crop, rng)
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.5))
    return ImageEnhance.Contrast(crop).enhance(rng.uniform(0.6, 1.3))


def _tinted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Map the grey levels through three random dark, middle and light colours."""
    dark, middle, light = (
        tuple(int(v) for v in np.clip(grey + rng.normal(0, 25, 3), 0, 255))
        for grey in (25, 120, 230)
    )
    return ImageOps.colorize(ImageOps.grayscale(image), dark, light, mid=middle)
