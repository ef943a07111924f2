"""The plots of the MoME report, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plots import draw_plot
from ..statistics import OVERALL
from .encoders import ENCODERS
from .tasks import GROUPS

PLOTS = {name: f"{name}.png" for name in ("arms", "differences", "weights", "adapters")}
NAMES = {
    "clip": "clip alone",
    "pool+addition": "pooling + addition",
    "adt+addition": "ADT + addition",
    "adt+router": "ADT + router",
    "one": "… continued, one adapter",
    "mole": "… continued, MoLE",
    "wide": "… continued, one wide adapter",
}
COLORS = {
    "clip": "#b0b0b0",
    "pool+addition": "#6e6e6e",
    "adt+addition": "#56b4e9",
    "adt+router": "#0072b2",
    "one": "#f0e442",
    "mole": "#d55e00",
    "wide": "#e69f00",
}
ENCODER_COLORS = ("#e69f00", "#0072b2", "#009e73")


def draw(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Draw all plots into a folder; returns their paths."""
    seeds, layers = len(found["adapters"]), len(found["adapters"][0])
    return [
        draw_plot(folder / PLOTS["arms"], (9.4, 4.4), 1, found, _arms),
        draw_plot(folder / PLOTS["differences"], (8.6, 3.8), 1, found, _differences),
        draw_plot(folder / PLOTS["weights"], (8.6, 3.6), 2, found, _weights),
        draw_plot(folder / PLOTS["adapters"], (2.6 * seeds * layers, 2.9), seeds * layers, found, _adapters),
    ]  # fmt: skip


def _arms(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    ax = axes[0]
    groups = (*GROUPS, OVERALL)
    width = 0.86 / len(NAMES)
    for i, (arm, name) in enumerate(NAMES.items()):
        entries = [found["accuracy"][arm][group] for group in groups]
        x = np.arange(len(groups)) + (i - (len(NAMES) - 1) / 2) * width
        means, spread = ([entry[k] for entry in entries] for k in ("mean", "std"))
        ax.bar(x, means, width * 0.92, color=COLORS[arm], label=name)
        ax.errorbar(x, means, spread, fmt="none", ecolor="black", capsize=2, lw=1)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(0, 100)
    ax.set_ylabel("test questions answered right (%)")
    ax.set_title("Mean over seeds; bars: ± standard deviation", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)


def _differences(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    ax = axes[0]
    pairs = found["differences"][::-1]
    entries = [pair[OVERALL] for pair in pairs]
    y = np.arange(len(pairs))
    ax.errorbar(
        [e["mean"] for e in entries],
        y,
        xerr=[2 * e["error"] for e in entries],
        fmt="o",
        color="#0072b2",
        capsize=3,
    )
    for place, entry in zip(y, entries, strict=True):
        ax.plot(entry["seeds"], [place] * len(entry["seeds"]), "|", color="#d55e00", ms=9)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(y, [f"{NAMES[p['of']]}\n− {NAMES[p['minus']]}" for p in pairs], fontsize=6.5)
    ax.set_xlabel("points overall; bars: ± 2 paired standard errors, strokes: seeds")


def _weights(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    for ax, (arm, weights) in zip(axes, found["weights"].items(), strict=False):
        bottom = np.zeros(len(GROUPS))
        for name, color in zip(ENCODERS, ENCODER_COLORS, strict=True):
            share = np.array([weights[group][name]["mean"] for group in GROUPS])
            ax.bar(GROUPS, share, 0.65, bottom=bottom, color=color, label=name)
            bottom += share
        ax.set_title(NAMES[arm], fontsize=9)
    axes[0].set_ylabel("weight (%), mean over seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _adapters(figure: Figure, axes: np.ndarray, found: dict[str, Any]) -> None:
    places = [(s, n) for s, of in enumerate(found["adapters"]) for n in range(len(of))]
    for ax, (seed, layer) in zip(axes, places, strict=True):
        shares = found["adapters"][seed][layer]["shares"]
        image = np.array([shares[group] for group in GROUPS])
        ax.imshow(image, cmap="Blues", vmin=0, vmax=130)
        for row, column in np.ndindex(*image.shape):
            ax.annotate(f"{image[row, column]:.0f}", (column, row), ha="center", va="center")
        ax.set_title(f"seed {seed}, layer {layer}", fontsize=9)
        ax.set_xticks(range(image.shape[1]), [f"#{k}" for k in range(image.shape[1])])
        ax.set_yticks(range(len(GROUPS)), GROUPS)
