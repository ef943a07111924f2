"""The plots of the report, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .data import DOMAINS
from .results import METHODS
from .statistics import OVERALL

PLOTS = {name: f"{name}.png" for name in ("accuracy", "depth", "routing", "cost")}
COLORS = {
    "joint": "#b0b0b0",
    "continued": "#6e6e6e",
    "specific": "#56b4e9",
    "separate": "#0072b2",
    "mixpert": "#e69f00",
    "mixpert routed": "#d55e00",
}
NAMES = {
    "joint": "joint only",
    "continued": "joint, continued (control)",
    "specific": "task-specific only",
    "separate": "separate encoders from joint",
    "mixpert": "joint → experts, teacher-routed",
    "mixpert routed": "joint → experts, routed (score difference)",
}
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
RULE_COLORS = ("#0072b2", "#d55e00", "#009e73")
RULE_MARKS = ("o", "s", "^")


def draw(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Draw all plots into a folder; returns their paths."""
    return [
        draw_plot(folder / PLOTS["accuracy"], (8.6, 4.2), 1, found, _accuracy),
        draw_plot(folder / PLOTS["depth"], (8.6, 3.6), 2, found, _depth),
        draw_plot(folder / PLOTS["routing"], (10.2, 3.8), 3, found, _routing),
        draw_plot(folder / PLOTS["cost"], (8.6, 3.6), 2, found, _cost),
    ]


def draw_plot(path: Path, size: tuple[float, float], columns: int, found: dict, fill) -> Path:
    """Draw a figure of some axes beside each other, which ``fill(figure, axes, found)`` fills."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        fill(figure, figure.subplots(1, columns, squeeze=False)[0], found)
        canvas.print_png(str(path))
    return path


def _accuracy(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    ax = axes[0]
    groups = (*DOMAINS, OVERALL)
    width = 0.8 / len(METHODS)
    lowest = 100.0
    for i, method in enumerate(METHODS):
        entries = [found["accuracy"][method][group] for group in groups]
        x = np.arange(len(groups)) + (i - (len(METHODS) - 1) / 2) * width
        means = [entry["mean"] for entry in entries]
        ax.bar(x, means, width * 0.92, color=COLORS[method], label=NAMES[method])
        ax.errorbar(
            x, means, [e["std"] for e in entries], fmt="none", ecolor="black", capsize=2, lw=1
        )
        lowest = min(lowest, *(e["mean"] - e["std"] for e in entries))
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(max(0, 5 * np.floor(lowest / 5) - 5), 100)
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(
        "Mean over seeds; bars: ± standard deviation (axis does not begin at 0)", fontsize=9
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _depth(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    rows = found["depth"]
    x = np.arange(len(rows))
    for i, (key, color) in enumerate((("minus joint", "#0072b2"), ("minus continued", "#d55e00"))):
        entries = [row[key][OVERALL] for row in rows]
        name = {"minus joint": "joint only", "minus continued": "joint, continued (control)"}[key]
        axes[0].errorbar(
            x + 0.06 * (i - 0.5),
            [e["mean"] for e in entries],
            [2 * e["error"] for e in entries],
            fmt="o-",
            color=color,
            capsize=3,
            label=f"against {name}",
        )
    axes[0].axhline(0, color="black", lw=0.8)
    axes[0].set_ylabel("overall accuracy, difference (points)")
    axes[0].set_title("Bars: ± 2 paired standard errors", fontsize=9)
    axes[0].legend(frameon=False)
    added = {row["cloned"]: row["parameters"] for row in found["cost"]["depth"]}
    whole = found["cost"]["methods"]["one encoder"]["parameters"]
    share = [100 * added[row["cloned"]] / whole for row in rows]
    axes[1].bar(x, share, 0.6, color="#999999")
    for place, value in zip(x, share, strict=True):
        axes[1].annotate(
            f"{value:.0f} %", (place, value), (0, 2), textcoords="offset points", ha="center"
        )
    axes[1].set_ylabel("added parameters (% of one encoder)")
    for ax in axes:
        ax.set_xticks(x, [row["cloned"] for row in rows])
        ax.set_xlabel("cloned layers (beside the projector)")


def _routing(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    kinds = list(dict.fromkeys(curve["kind"] for curve in found["curves"]))
    for ax, kind in zip(axes, kinds, strict=True):
        curves = [curve for curve in found["curves"] if curve["kind"] == kind]
        for curve, color, mark in zip(curves, RULE_COLORS, RULE_MARKS, strict=True):
            ax.plot(
                curve["fallback"],
                curve["accuracy"],
                color=color,
                marker=mark,
                ms=3,
                lw=1,
                label=curve["rule"],
            )
        ax.set_title(f"{kind} images", fontsize=9)
        ax.set_xlabel("fallback rate (%)")
        ax.set_xlim(-3, 103)
    axes[0].set_ylabel("task accuracy (%), mean over seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        [f"{label} (a mark a threshold, 0 to 1)" for label in labels],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )


def _cost(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    times, methods = found["cost"]["times"], found["cost"]["methods"]
    colors = ("#999999", "#e69f00", "#0072b2")
    width = 0.27
    for i, (name, color) in enumerate(zip(methods, colors, strict=True)):
        each = [1e6 * t["seconds"][name] / t["batch"] for t in times]
        axes[0].bar(
            np.arange(len(times)) + (i - 1) * width, each, width * 0.95, color=color, label=name
        )
    axes[0].set_xticks(range(len(times)), [str(t["batch"]) for t in times])
    axes[0].set_xlabel("images in a mixed batch")
    axes[0].set_ylabel("forward time (µs an image, median)")
    axes[0].legend(frameon=False)
    _bars(
        axes[1], [counts["parameters"] / 1e3 for counts in methods.values()], list(methods), colors
    )
    axes[1].set_ylabel("parameters (thousands)")


def _bars(ax: Axes, values: list[float], names: list[str], colors: tuple[str, ...]) -> None:
    ax.bar(range(len(values)), values, 0.6, color=colors)
    for i, value in enumerate(values):
        ax.annotate(f"{value:.0f}", (i, value), (0, 2), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in names])
