"""Charts: which of five bars is the highest, or what does the line do."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .styles import SOURCES, Sources, font

CANVAS = 64  # drawn at twice the size of the images, for smooth edges
BARS = 5
LABELS = (
    *(f"bar {i + 1} is highest" for i in range(BARS)),
    "rises",
    "falls",
    "peaks",
    "dips",
    "flat",
)
SUBJECTS = ("Sales", "Rain", "Visits", "Output", "Delay", "Yield", "Trade", "Load")


def draw_chart(label: int, rng: np.random.Generator, split: str) -> Image.Image:
    """Draw a chart whose answer is ``LABELS[label]``, 64 x 64 pixels RGB, in the styles of ``split``."""
    style = SOURCES[split]
    page = Image.new("RGB", (CANVAS, CANVAS), _pick(rng, style.papers))
    pen = ImageDraw.Draw(page)
    left, right = rng.integers(5, 12), rng.integers(54, 61)
    top, bottom = rng.integers(6, 14), rng.integers(50, 58)
    box = (int(left), int(top), int(right), int(bottom))
    _frame(pen, box, rng, style)
    palette = list(_pick(rng, style.palettes))
    if label < BARS:
        _bars(pen, box, label, rng, palette)
    else:
        _line(pen, box, LABELS[label], rng, palette)
    return page


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]


def _frame(pen: ImageDraw.ImageDraw, box: tuple, rng: np.random.Generator, style: Sources) -> None:
    left, top, right, bottom = box
    ink = _pick(rng, style.inks)
    if rng.random() < 0.5:
        for y in np.linspace(top, bottom, int(rng.integers(3, 7)))[:-1]:
            pen.line((left, y, right, y), fill="#c8c8c8")
    pen.line((left, bottom, right, bottom), fill=ink)
    if rng.random() < 0.7:
        pen.line((left, top, left, bottom), fill=ink)
    text = f"{_pick(rng, SUBJECTS)} {rng.integers(10, 99)}"
    face = font(_pick(rng, style.fonts), int(rng.integers(6, 9)))
    pen.text((float(rng.integers(2, 26)), 0 if rng.random() < 0.8 else bottom + 1), text, ink, face)


def _bars(
    pen: ImageDraw.ImageDraw, box: tuple, highest: int, rng: np.random.Generator, palette: list
) -> None:
    left, top, right, bottom = box
    heights = rng.uniform(0.15, 0.78, BARS)
    heights[highest] = 0
    heights[highest] = min(heights.max() + rng.uniform(0.1, 0.3), 1.0)
    colors = palette if rng.random() < 0.4 else [_pick(rng, tuple(palette))] * BARS
    step = (right - left - 1) / BARS
    thickness = step * rng.uniform(0.55, 0.95)
    for i, height in enumerate(heights):
        x = left + 1 + (i + 0.5) * step
        y = bottom - height * (bottom - top)
        pen.rectangle((x - thickness / 2, y, x + thickness / 2, bottom - 1), fill=colors[i])


def _line(
    pen: ImageDraw.ImageDraw, box: tuple, trend: str, rng: np.random.Generator, palette: list
) -> None:
    left, top, right, bottom = box
    count = int(rng.integers(6, 12))
    t = np.linspace(0, 1, count)
    turn = rng.uniform(0.3, 0.7)
    bend = np.where(t < turn, t / turn, (1 - t) / (1 - turn))
    shapes = {"rises": t, "falls": 1 - t, "peaks": bend, "dips": 1 - bend, "flat": 0 * t}
    swing = rng.uniform(0.4, 0.8)
    low = rng.uniform(0.1, 0.9 - swing) if trend != "flat" else rng.uniform(0.15, 0.8)
    y = np.clip(low + swing * shapes[trend] + rng.normal(0, 0.05, count), 0, 1)
    points = [
        (left + 1 + u * (right - left - 2), bottom - 1 - v * (bottom - top - 2))
        for u, v in zip(t, y, strict=True)
    ]
    color = palette[0]
    if rng.random() < 0.3:
        pen.polygon([(points[0][0], bottom - 1), *points, (points[-1][0], bottom - 1)], fill=color)
        return
    pen.line(points, fill=color, width=int(rng.integers(2, 5)))
    if rng.random() < 0.4:
        for px, py in points:
            pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill=color)
