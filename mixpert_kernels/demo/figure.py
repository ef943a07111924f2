"""The picture: each image, the expert it went to, and its scores; mistakes are marked."""

from __future__ import annotations

import math
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageOps

from mixpert_kernels.demo.images import Sample
from mixpert_kernels.demo.results import Routed

COLORS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c510a", "#999933")
WRONG, INK, MUTED, PAPER = "#c00020", "#1a1a1a", "#5c5c5c", "#ffffff"
COLUMNS = 7
LEGENDS = ((8, 9.0), (8, 7.5), (4, 9.0), (4, 7.5), (2, 8.0), (2, 7.0), (1, 7.0))  # columns, size
LARGEST = 49  # images shown of a user's folder
THUMBNAIL, MAT = (244, 180), "#ececec"
CELL_WIDTH, PICTURE, BAR, GAP, HEADER = 1.9, 1.38, 0.14, 0.36, 1.15  # inches; a bar an expert


def color_of(expert: int) -> str:
    return COLORS[expert % len(COLORS)]


def draw_figure(
    path: Path,
    samples: Sequence[Sample],
    routed: Sequence[Routed],
    names: Sequence[str],
    title: str,
    notes: Sequence[str],
) -> None:
    """Write the PNG, whole or not at all.

    Args:
        path: the file to write.
        samples: the images; at most ``LARGEST`` are shown.
        routed: where each went.
        names: of the experts.
        title: first line.
        notes: smaller lines under it.
    """
    shown = min(len(samples), LARGEST)
    columns = min(COLUMNS, max(3, shown))
    rows = math.ceil(shown / columns)
    wide = max(4, columns) / columns  # the title and the names need the width of four cells
    picture, bars = PICTURE * wide, max(0.5, BAR * len(names))
    size = (columns * wide * CELL_WIDTH + 0.3, rows * (picture + bars + GAP) + HEADER)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK}):
        figure = Figure(figsize=size, dpi=110, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        _header(figure, names, title, notes)
        top = 1 - HEADER / size[1]
        grid = figure.add_gridspec(
            rows, columns, left=0.012, right=0.988, top=top, bottom=0.012, wspace=0.09, hspace=0.15
        )
        for i in range(shown):
            cell = grid[i].subgridspec(2, 1, height_ratios=(picture, bars), hspace=0.06)
            _picture(figure.add_subplot(cell[0]), samples[i], routed[i], names)
            _bars(figure.add_subplot(cell[1]), routed[i], names)
        _write(canvas, path)


def _header(figure: Figure, names: Sequence[str], title: str, notes: Sequence[str]) -> None:
    width, height = figure.get_size_inches()
    wide = int(width * 12.5)
    lines = [line for note in notes for line in textwrap.wrap(note, wide)]
    texts = [
        figure.text(0.012, 1 - 0.13 / height, title, fontsize=14, weight="bold", va="top"),
        figure.text(
            0.012, 1 - 0.43 / height, "\n".join(lines), color=MUTED, va="top", linespacing=1.35
        ),
    ]
    taken = [text.get_window_extent() for text in texts]
    handles = [Patch(color=color_of(k), label=name) for k, name in enumerate(names)]
    for columns, size in LEGENDS:  # the first that covers no text
        legend = figure.legend(
            handles=handles,
            loc="upper right",
            bbox_to_anchor=(0.992, 1 - 0.06 / height),
            ncols=min(columns, len(names)),
            frameon=False,
            fontsize=size,
            handlelength=1.1,
            columnspacing=1.2,
            labelspacing=0.3,
        )
        if (columns, size) == LEGENDS[-1] or not legend.get_window_extent().count_overlaps(taken):
            return
        legend.remove()


def _short(text: str, most: int) -> str:
    """The text without its middle: names may differ at the end alone."""
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[-tail:]}"


def _picture(ax: Axes, sample: Sample, result: Routed, names: Sequence[str]) -> None:
    color = color_of(result.expert) if result.correct is not False else WRONG
    picture = ImageOps.pad(sample.image, THUMBNAIL, Image.Resampling.LANCZOS, color=MAT)
    picture = ImageOps.expand(picture, 6, MAT)  # the frame covers no part of the image
    ax.imshow(np.asarray(picture), aspect="auto")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(edgecolor=color, linewidth=3.2)
    name, got = _short(sample.name, 22), _short(names[result.expert], 16)
    if result.correct is False:
        wanted = _short(names[result.wanted], 16)
        text = f"✗ {name}: is {wanted}, got {got}"
        if len(text) > 40:  # too small to read: the picture says which it is
            text = f"✗ is {wanted}, got {got}"
        size = 6.6 * min(1, 31 / len(text))  # 31 letters are as wide as the picture
        ax.set_title(
            text, fontsize=size, color="white", backgroundcolor=WRONG, pad=4, weight="bold"
        )
    else:
        text = f"{name} → {got}"
        ax.set_title(text, fontsize=8 * min(1, 28 / len(text)), color=INK, pad=4)


def _bars(ax: Axes, result: Routed, names: Sequence[str]) -> None:
    count = len(names)
    for k, (name, score) in enumerate(zip(names, result.scores, strict=True)):
        strong = k == result.expert
        y = count - 1 - k
        ax.add_patch(Rectangle((0, y - 0.36), 1, 0.72, facecolor="#f0f0f0"))
        ax.add_patch(Rectangle((0, y - 0.36), score, 0.72, facecolor=color_of(k)))
        weight = "bold" if strong else "normal"
        label = _short(name, 12)
        ax.text(-0.03, y, label, ha="right", va="center", fontsize=6.2, weight=weight)
        ax.text(1.03, y, f"{score:.2f}", ha="left", va="center", fontsize=6.2, weight=weight)
    ax.set_xlim(-0.62, 1.3)
    ax.set_ylim(-0.6, count - 0.4)
    ax.axis("off")


def _write(canvas: FigureCanvasAgg, path: Path) -> None:
    handle, draft = tempfile.mkstemp(suffix=".png", prefix=f".{path.stem}.", dir=path.parent)
    os.close(handle)
    try:
        canvas.print_png(draft)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
