"""Charts drawn by matplotlib: ten kinds, with fonts and palettes kept apart for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


class Style(NamedTuple):
    """What a chart is drawn with."""

    font: str
    colors: tuple[str, ...]
    colormap: str
    paper: str


EVALUATION_STYLES = (
    Style("DejaVu Sans", ("#4c72b0", "#dd8452", "#55a868", "#c44e52"), "viridis", "#ffffff"),
    Style("DejaVu Serif", ("#264653", "#2a9d8f", "#e9c46a", "#e76f51"), "YlGnBu", "#fdfdf8"),
)
TRAINING_STYLES = (
    Style("STIXGeneral", ("#1b9e77", "#d95f02", "#7570b3", "#e7298a"), "magma", "#ffffff"),
    Style("DejaVu Sans Mono", ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), "Blues", "#f7f7f7"),
    Style("cmr10", ("#333333", "#777777", "#aaaaaa", "#555555"), "Greys", "#ffffff"),
    Style("STIXGeneral", ("#8c510a", "#01665e", "#d8b365", "#5ab4ac"), "cividis", "#fffdf5"),
)
GRIDS: tuple[Literal["x", "y", "both"], ...] = ("x", "y", "both")
SUBJECTS = ("Revenue", "Rainfall", "Visitors", "Output", "Latency", "Yield", "Exports", "Demand")
REGIONS = ("North", "South", "East", "West", "Coast", "Valley")


def _line(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    x = np.arange(12)
    for color, region in zip(style.colors[:3], REGIONS, strict=False):
        ax.plot(x, rng.normal(0.4, 1, 12).cumsum() + 8, color=color, marker="o", ms=3, label=region)
    ax.legend(fontsize=7)


def _bars(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    ax.bar(REGIONS[:5], rng.uniform(2, 10, 5), color=style.colors[0], edgecolor="black")


def _horizontal_bars(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    ax.barh(REGIONS, np.sort(rng.uniform(1, 10, 6)), color=style.colors)


def _pie(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    ax.pie(rng.uniform(1, 5, 4), labels=REGIONS[:4], colors=style.colors, autopct="%d%%")


def _scatter(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    for color in style.colors[:3]:
        center = rng.uniform(0, 10, 2)
        x, y = rng.normal(center[:, None], 1, (2, 30))
        ax.scatter(x, y, s=12, color=color, alpha=0.8)


def _histogram(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    ax.hist(rng.gamma(3, 2, 400), bins=20, color=style.colors[1], edgecolor="white")


def _heatmap(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    mesh = ax.imshow(rng.uniform(0, 1, (6, 6)), cmap=style.colormap)
    ax.set_xticks(range(6), REGIONS, rotation=45, fontsize=7)
    ax.figure.colorbar(mesh, ax=ax)


def _area(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    layers = rng.uniform(1, 3, (3, 12)).cumsum(axis=1)
    ax.stackplot(np.arange(12), layers, colors=style.colors, labels=REGIONS[:3])
    ax.legend(loc="upper left", fontsize=7)


def _boxes(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    parts = ax.boxplot(rng.normal(rng.uniform(3, 8, 5), 1, (40, 5)), patch_artist=True)
    for patch in parts["boxes"]:
        patch.set_facecolor(style.colors[2])


def _stacked_bars(ax: Axes, rng: np.random.Generator, style: Style) -> None:
    bottom = np.zeros(5)
    for color in style.colors[:3]:
        height = rng.uniform(1, 4, 5)
        ax.bar(range(2019, 2024), height, bottom=bottom, color=color)
        bottom += height


KINDS: dict[str, Callable[[Axes, np.random.Generator, Style], None]] = {
    "line": _line,
    "bars": _bars,
    "barh": _horizontal_bars,
    "pie": _pie,
    "scatter": _scatter,
    "histogram": _histogram,
    "heatmap": _heatmap,
    "area": _area,
    "boxes": _boxes,
    "stacked": _stacked_bars,
}


def draw_chart(kind: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """One chart of ``kind`` with random data, about 320 x 300 pixels."""
    size = (rng.uniform(2.9, 3.6), rng.uniform(2.6, 3.2))
    text: Any = {"font.family": style.font, "font.size": 8, "axes.formatter.use_mathtext": True}
    with rc_context(text):
        figure = Figure(figsize=size, dpi=100, facecolor=style.paper, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        ax = figure.add_subplot(facecolor=style.paper)
        KINDS[kind](ax, rng, style)
        ax.set_title(f"{rng.choice(SUBJECTS)} by region, {rng.integers(1990, 2024)}")
        if kind not in ("pie", "heatmap"):
            ax.set_axisbelow(True)
            ax.grid(axis=GRIDS[int(rng.integers(3))], alpha=0.4)
            ax.set_ylabel(str(rng.choice(SUBJECTS)))
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def evaluation_charts(rng: np.random.Generator) -> dict[str, Image.Image]:
    """One chart of each kind, in the evaluation fonts and palettes."""
    styles = EVALUATION_STYLES
    return {
        kind: draw_chart(kind, rng, styles[index % len(styles)]) for index, kind in enumerate(KINDS)
    }


def training_chart(index: int, rng: np.random.Generator) -> Image.Image:
    """A chart in one of the training fonts and palettes."""
    kind = tuple(KINDS)[index % len(KINDS)]
    return draw_chart(kind, rng, TRAINING_STYLES[int(rng.integers(len(TRAINING_STYLES)))])
