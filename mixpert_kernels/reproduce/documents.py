"""Documents: which of ten words does the line in large print say."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .styles import SOURCES, font

CANVAS = 64  # drawn at twice the size of the images
LABELS = ("tax", "fee", "sum", "due", "net", "pay", "cost", "debt", "loan", "rent")
FILLER = (
    *("the committee approved", "invoice no. 4711", "item count price", "dear sir or madam"),
    *("minutes of the meeting", "page 3 of 12", "received in full", "with kind regards"),
)


def draw_document(label: int, rng: np.random.Generator, split: str) -> Image.Image:
    """Draw a part of a page that says ``LABELS[label]``, 64 x 64 pixels RGB, in the styles of ``split``."""
    style = SOURCES[split]
    page = Image.new("RGB", (CANVAS, CANVAS), _pick(rng, style.papers))
    ink, face = _pick(rng, style.inks), _pick(rng, style.fonts)
    word = LABELS[label]
    size = int(rng.integers(21, 27))
    while font(face, size).getlength(word) > CANVAS - 6:
        size -= 1
    width = font(face, size).getlength(word)
    x = min(rng.uniform(4, 10), CANVAS - 2 - width)
    y = int(rng.integers(14, 25))
    pen = ImageDraw.Draw(page)
    pen.text((x, y), word, ink, font(face, size))
    fill_lines(pen, rng, split, (0, y - 1))
    fill_lines(pen, rng, split, (y + size + 6, CANVAS))
    return page


def fill_lines(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, split: str, rows: tuple[int, int]
) -> None:
    """Fill the rows (first, last) of a page with small print or a rule."""
    style = SOURCES[split]
    ink, face = _pick(rng, style.inks), font(_pick(rng, style.fonts), 7)
    y, last = rows
    x = int(rng.integers(0, 6))
    while y + 8 <= last:
        if rng.random() < 0.15:
            pen.line((x, y + 4, CANVAS - x, y + 4), fill=ink)
        else:
            pen.text((x, y), _pick(rng, FILLER), ink, face)
        y += 8


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]
