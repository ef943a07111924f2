"""Scenes: two to four coloured shapes on a photograph, to be counted, found and described."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..photos import crop

SIDE = 64
CELLS = 8  # a side: a position is the cell that holds a shape's centre
CELL = SIDE // CELLS
APART = 2  # cells between two shapes' centres, in either direction
COUNTS = (1, 2, 3)
COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "cross")
TONES = {
    "red": (208, 30, 36),
    "green": (30, 150, 60),
    "blue": (40, 70, 210),
    "yellow": (238, 208, 40),
}


class Thing(NamedTuple):
    """A shape in a scene.

    Attributes:
        color: of ``COLORS``.
        shape: of ``SHAPES``.
        column: of the cell that holds its centre, from the left.
        row: of that cell, from the top.
    """

    color: str
    shape: str
    column: int
    row: int


def choose_things(count: int, rng: np.random.Generator) -> list[Thing]:
    """``count`` shapes in cells apart from each other; no two have both colour and shape in common."""
    cells: list[tuple[int, int]] = []
    while len(cells) < count:
        column, row = (int(v) for v in rng.integers(0, CELLS, 2))
        if all(max(abs(column - c), abs(row - r)) >= APART for c, r in cells):
            cells.append((column, row))
    kinds = rng.choice(len(COLORS) * len(SHAPES), count, replace=False)
    return [
        Thing(COLORS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)], column, row)
        for kind, (column, row) in zip(kinds.tolist(), cells, strict=True)
    ]


def draw_scene(
    things: list[Thing], rng: np.random.Generator, split: str
) -> tuple[Image.Image, np.ndarray]:
    """Draw the shapes on a crop of one of the photographs of ``split``.

    Returns:
        64 x 64 pixels RGB, and which thing is at the centre of each cell: (8, 8), 0 none, else 1 + its number.
    """
    image = Image.fromarray(crop(rng, split, SIDE))
    pen = ImageDraw.Draw(image)
    cover = np.zeros((CELLS, CELLS), np.int64)
    middle = CELL * (np.arange(CELLS) + 0.5)
    for number, thing in enumerate(things):
        x = thing.column * CELL + rng.uniform(2, CELL - 2)
        y = thing.row * CELL + rng.uniform(2, CELL - 2)
        half = rng.uniform(5.0, 7.0)
        tone = np.clip(np.array(TONES[thing.color]) + rng.normal(0, 14, 3), 0, 255).astype(int)
        _shape(pen, thing.shape, x, y, half, tuple(tone.tolist()))
        cover[np.ix_(abs(middle - y) <= half, abs(middle - x) <= half)] = 1 + number
    return image, cover


def _shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float, tone: tuple
) -> None:
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=tone)
    elif shape == "square":
        half *= 0.9
        pen.rectangle((x - half, y - half, x + half, y + half), fill=tone)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=tone)
    else:
        bar = half / 3
        pen.rectangle((x - half, y - bar, x + half, y + bar), fill=tone)
        pen.rectangle((x - bar, y - half, x + bar, y + half), fill=tone)
