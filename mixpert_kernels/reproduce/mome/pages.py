"""Pages: parts of documents of any width and height, with one word in large print among small print."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..documents import FILLER
from ..styles import SOURCES, font

PATCH = 8  # pages are whole patches wide and high
HEIGHTS = (3, 4, 5, 6)  # in patches
WIDTHS = (8, 10, 12, 14, 16)
WORDS = (
    *("tax", "fee", "sum", "due", "net", "pay", "cost", "debt", "loan", "rent"),
    *("total", "audit", "stock", "bond", "asset", "price"),
)
FONTS = {  # of the large word: few and clear, for a small encoder that learns to read in a minute
    "train": (
        *("DejaVuSans.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSansMono-Bold.ttf"),
        *("DejaVuSerif.ttf", "DejaVuSerif-BoldItalic.ttf", "STIXGeneralBol.ttf", "cmss10.ttf"),
    ),
    "held_out": ("DejaVuSans-Oblique.ttf",),
    "test": ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"),
}
SIZE = 19  # of the large word's font, in pixels
STEP = 4  # pixels between the places where it may stand
LETTERS = tuple(sorted(set("".join(WORDS))))


class Page(NamedTuple):
    """A page and where its large letters are.

    Attributes:
        image: of a whole number of patches a side.
        letters: each letter of the word with its left and right edge, in pixels.
        top: of the word, in pixels.
        bottom: of the word, in pixels.
    """

    image: Image.Image
    letters: list[tuple[str, float, float]]
    top: float
    bottom: float


def draw_page(word: str, rng: np.random.Generator, split: str) -> Page:
    """Draw a part of a page that says ``word``, in the styles of ``split``."""
    style = SOURCES[split]
    width = PATCH * int(rng.choice(WIDTHS))
    height = PATCH * int(rng.choice(HEIGHTS))
    image = Image.new("RGB", (width, height), _pick(rng, style.papers))
    pen = ImageDraw.Draw(image)
    ink, face = _pick(rng, style.inks), font(_pick(rng, FONTS[split]), SIZE)
    room = width - face.getlength(word) - STEP
    x = STEP * float(rng.integers(0, max(1, room // STEP)))
    y = STEP * int(rng.integers(0, (height - SIZE - 3) // STEP + 1))
    pen.text((x, y), word, ink, face)
    letters = [
        (letter, x + face.getlength(word[:i]), x + face.getlength(word[: i + 1]))
        for i, letter in enumerate(word)
    ]
    small = font(_pick(rng, style.fonts), 7)
    for first, last in ((0, y), (y + 24, height)):
        for line in range(first, last - 7, 8):
            pen.text((int(rng.integers(0, 8)), line), _pick(rng, FILLER), ink, small)
    return Page(image, letters, y + 4, y + SIZE + 1)


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]
