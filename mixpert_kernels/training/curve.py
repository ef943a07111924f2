"""The calibration's curve, as a picture and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .calibration import Calibration


def curve_report(result: Calibration, images: int) -> dict[str, Any]:
    """Plain values: the strategy, its threshold's name and value, and the curve it was chosen from."""
    name = "tau" if result.strategy.name == "score_threshold" else "delta"
    return {
        "routing": result.strategy.name,
        "against": result.strategy.against,
        "threshold": name,
        "value": result.strategy.threshold,
        "images": images,
        "chosen": asdict(result.chosen),
        "curve": [asdict(point) for point in result.curve],
    }


def draw_curve(path: Path, result: Calibration, name: str, versatile: str) -> None:
    """Draw accuracy, fallback to the expert called ``versatile``, and errors over the threshold called ``name``.

    Into a PNG; needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    ax = figure.add_subplot()
    x = [point.threshold for point in result.curve]
    for field, color, label in (
        ("accuracy", "#0072b2", "right expert"),
        ("fallback", "#7f7f7f", f"fell back to {versatile}"),
        ("errors", "#c00020", "wrong expert"),
    ):
        ax.plot(x, [getattr(point, field) for point in result.curve], color=color, label=label)
    chosen = result.strategy.threshold
    ax.axvline(chosen, color="black", linestyle=":", label=f"chosen: {chosen:g}")
    ax.set(xlabel=name, ylabel="share of images", ylim=(-0.02, 1.02), xlim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)
