"""Choosing tau and delta on labelled data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixpert_kernels.backends.reference.route import decide
from mixpert_kernels.ops import Strategy

from .router import check_labels

POINTS = 101


@dataclass(frozen=True)
class CurvePoint:
    """One threshold: how often the decision is right, and how often it falls back to the versatile expert.

    Attributes:
        threshold: tau or delta.
        accuracy: share of images sent to their label's expert.
        fallback: share sent to expert 0 although another scored best.
        errors: share sent to an expert that is neither their label's nor the versatile one.
    """

    threshold: float
    accuracy: float
    fallback: float
    errors: float


@dataclass(frozen=True)
class Calibration:
    """The strategy chosen and the curve it was chosen from."""

    strategy: Strategy
    curve: list[CurvePoint] = field(repr=False)

    @property
    def chosen(self) -> CurvePoint:
        wanted = self.strategy.threshold
        return min(self.curve, key=lambda point: abs(point.threshold - wanted))


def calibrate(
    tower: nn.Module,
    data: Tensor | Iterable,
    labels: Tensor | None = None,
    *,
    max_errors: float = 0.05,
    progress: bool = False,
) -> Calibration:
    """Pick tau (``score_threshold``) or delta (``score_difference``) and set it in ``tower.config``.

    Chosen is the smallest threshold at which at most ``max_errors`` of the images go to a wrong expert other than the
    versatile one, which serves any image; if there is none, the one with the fewest such errors. The rule is ours.

    Args:
        tower: a FusedMixpertTower with a trained router.
        data: features (N, D) from ``tower.router_features``, or an iterable of (pixel_values, labels) batches.
        labels: (N,) integers, 0 <= label < E, with features; None with batches.
        max_errors: 0..1.
        progress: show a progress bar over batches.

    Returns:
        Calibration: the strategy and the curve over 101 thresholds of [0, 1].

    Raises:
        ValueError: labels out of range or of the wrong number, max_errors outside [0, 1], or a ``direct`` strategy,
            which has no threshold.
    """
    strategy = tower.config.strategy
    if strategy.name == "direct":
        raise ValueError(
            "calibrate: routing must be score_threshold or score_difference, got direct"
        )
    if not 0 <= max_errors <= 1:
        raise ValueError(f"calibrate: max_errors must lie in [0, 1], got {max_errors}")
    features, labels = _features(tower, data, labels, progress)
    check_labels("calibrate", features, labels, tower.router)
    with torch.no_grad():
        scores = tower.router(features.float()).softmax(-1)
    curve = [_point(scores, labels, strategy, i / (POINTS - 1)) for i in range(POINTS)]
    good = [point for point in curve if point.errors <= max_errors]
    best = good[0] if good else min(curve, key=lambda point: point.errors)
    name = "tau" if strategy.name == "score_threshold" else "delta"
    setattr(tower.config, name, best.threshold)
    return Calibration(replace(strategy, **{name: best.threshold}), curve)


def _features(tower, data, labels, progress) -> tuple[Tensor, Tensor]:
    if isinstance(data, Tensor):
        if labels is None:
            raise ValueError("calibrate: labels must be given with features, got None")
        return data, labels.to(data.device) if isinstance(labels, Tensor) else labels
    if labels is not None:
        raise ValueError(
            "calibrate: labels must be None with batches, which carry them, got labels"
        )
    pooled, found = [], []
    with torch.no_grad():
        for pixels, batch_labels in tqdm(data, desc="features", disable=not progress, leave=False):
            pooled.append(tower.router_features(pixels.to(tower.device)))
            found.append(batch_labels.to(tower.device))
    if not pooled:
        raise ValueError("calibrate: data must hold at least one batch, got none")
    return torch.cat(pooled), torch.cat(found)


def _point(scores: Tensor, labels: Tensor, strategy: Strategy, threshold: float) -> CurvePoint:
    chosen = decide(scores, strategy.name, threshold, strategy.against)
    best = scores.argmax(-1)
    right = chosen == labels
    fallback = (chosen == 0) & (best != 0)
    return CurvePoint(
        threshold,
        float(right.float().mean()),
        float(fallback.float().mean()),
        float((~right & (chosen != 0)).float().mean()),
    )
