"""Means, spreads and paired differences of which test images were answered right."""

from __future__ import annotations

from typing import Any

import numpy as np

from .data import CLASSES, DOMAINS, MAKERS

OVERALL = "overall"

Right = dict[str, np.ndarray]  # by kind of image: (seeds, images) bool


def labels_of(kind: str, count: int) -> np.ndarray:
    """The answers of the images of a kind, of the union of all labels."""
    return np.arange(count) % CLASSES + DOMAINS.index(MAKERS[kind][1]) * CLASSES


def table_of(right: Right, domains: tuple[str, ...] = DOMAINS) -> dict[str, Any]:
    """Accuracy in percent: each kind of image, and the mean of the domains."""
    per_seed = {kind: 100 * images.mean(1) for kind, images in right.items()}
    per_seed[OVERALL] = np.mean([per_seed[domain] for domain in domains], axis=0)
    return {kind: summary(values) for kind, values in per_seed.items()}


def summary(values: np.ndarray) -> dict[str, Any]:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": round(float(values.mean()), 3),
        "std": round(spread, 3),
        "seeds": [round(float(v), 3) for v in values],
    }


def differences(a: Right, b: Right, domains: tuple[str, ...] = DOMAINS) -> dict[str, Any]:
    """Paired differences in points, a domain and overall (the mean of the domains)."""
    found = {domain: paired(a[domain], b[domain]) for domain in domains}
    overall = np.mean([found[domain]["seeds"] for domain in domains], axis=0)
    error = float(np.sqrt(sum(found[d]["error"] ** 2 for d in domains)) / len(domains))
    return {**found, OVERALL: summary(overall) | {"error": round(error, 3)}}


def paired(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Difference in points of two (seeds, images) bool, with its standard error over images."""
    each = 100.0 * a.astype(float) - 100.0 * b  # (seeds, images)
    error = float(np.sqrt((each.var(1, ddof=1) / each.shape[1]).sum()) / len(each))
    return summary(each.mean(1)) | {"error": round(error, 3)}
