"""The plot of a benchmark run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from report import Row

# How a variant is called and drawn, the first on top; Okabe and Ito's colour-blind safe colours.
STYLES = {
    "ours": ("this library", "#0072B2", "o"),
    "ours_cpu": ("this library", "#0072B2", "o"),
    "ours_triton": ("this library, Triton", "#004B76", "o"),
    "ours_cuda": ("this library, CUDA", "#00304C", "o"),
    "ours_reference": ("this library's reference backend", "#8FC1E3", "o"),
    "compiled_dense": ("torch.compile of the baseline", "#009E73", "D"),
    "compiled_eager": ("torch.compile of the baseline", "#009E73", "D"),
    "compiled_frozen_dense": ("torch.compile, weights frozen", "#7FCDB5", "D"),
    "compiled_strong_loop": ("torch.compile of the sorted loop", "#4D4D4D", "D"),
    "strong_loop": ("loop over sorted slices", "#56B4E9", "s"),
    "sorted_loop": ("loop over sorted slices", "#56B4E9", "s"),
    "naive_loop": ("loop with masks", "#E69F00", "^"),
    "grouped_mm": ("grouped_mm", "#CC79A7", "v"),
    "gathered_bmm": ("gathered weights", "#7A5C99", "P"),
    "gathered_gain": ("gathered weights", "#7A5C99", "P"),
    "all_experts": ("all experts, then select", "#D55E00", "X"),
}
WIDE_TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 4, 5)
BASES = ("dense", "eager")
INK, MUTED, GRID = "#222222", "#6B6B6B", "#DDDDDD"


def plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Draw each scenario as a line of dots, time / dense on a log axis, one panel a bench."""
    benches = list(dict.fromkeys(row.bench for row in rows))
    scenarios = {b: list(dict.fromkeys(r.scenario for r in rows if r.bench == b)) for b in benches}
    heights = [len(scenarios[bench]) + 1 for bench in benches]
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure, axes = plt.subplots(
            len(benches),
            1,
            figsize=(9, 1.9 + 0.42 * sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
            sharex=True,
        )
        for axis, bench in zip(axes[:, 0], benches, strict=True):
            _panel(axis, bench, scenarios[bench], [r for r in rows if r.bench == bench])
        _time_axis(axes[-1, 0], rows)
        figure.legend(
            handles=_legend({row.variant for row in rows}),
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        figure.suptitle(
            "Time relative to the dense single expert (route: to eager PyTorch); left is faster\n",
            fontsize=11,
            color=INK,
        )
        top = 1 - 0.28 / figure.get_figheight()  # inches below the upper edge
        figure.text(0.5, top, caption, ha="center", va="top", fontsize=7.5, color=MUTED)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _panel(axis: Any, bench: str, scenarios: list[str], rows: Sequence[Row]) -> None:
    names = list(STYLES)
    for row in rows:
        if row.variant in BASES:
            continue
        y = len(scenarios) - 1 - scenarios.index(row.scenario)
        _, colour, marker = STYLES.get(row.variant, (row.variant, MUTED, "."))
        rank = names.index(row.variant) if row.variant in names else len(names)
        is_ours = row.variant.startswith("ours") and row.variant != "ours_reference"
        axis.scatter(
            row.ratio,
            y,
            s=90 if is_ours else 55,
            color=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.5,
            zorder=50 - rank,
        )
        if is_ours:
            axis.annotate(
                f"{row.ratio:.2f}",
                (row.ratio, y),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
                weight="bold",
            )
    axis.axvline(1, color=INK, linewidth=1, zorder=1)
    axis.set_ylim(-0.6, len(scenarios) - 0.2)
    labels = [s.removeprefix(bench).strip(" ,") for s in reversed(scenarios)]
    axis.set_yticks(range(len(scenarios)), labels, color=INK)
    axis.set_title(bench, loc="left", fontsize=10, weight="bold", color=INK)
    axis.grid(axis="both", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _time_axis(axis: Any, rows: Sequence[Row]) -> None:
    """Log scale with plain numbers, steps between the powers of two where there is room."""
    ratios = [row.ratio for row in rows]
    low, high = min(0.7, *ratios) / 1.08, max(1.4, *ratios) * 1.08
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = WIDE_TICKS if high > 6 else FINE_TICKS
    axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(variants: set[str]) -> list[Any]:
    styles = dict.fromkeys(style for name, style in STYLES.items() if name in variants)
    return [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=label)
        for label, colour, marker in styles
    ]
