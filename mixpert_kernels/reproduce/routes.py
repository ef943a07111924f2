"""The router: trained on the trunk's features, its thresholds calibrated, its decisions on the test images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixpert_kernels.hf.tower import FusedMixpertTower
from mixpert_kernels.training import fit_router

from .data import Images, as_input, join
from .model import EVALUATION_BATCH

RATE = 3e-3  # of the router's learning
MAX_ERRORS = (
    0.002  # of the clean held-out images may go to a wrong expert that is not the versatile one
)


class Rule(NamedTuple):
    """A way to decide."""

    title: str
    routing: str
    against: str = "runner_up"


RULES = (
    Rule("direct", "direct"),
    Rule("score threshold", "score_threshold"),
    Rule("score difference", "score_difference"),
    Rule("score difference, against versatile", "score_difference", "versatile"),
)


def train_router(tower: FusedMixpertTower, train: list[Images]) -> float:
    """Train the router on domain labels, over the frozen trunk's features; returns its accuracy on them."""
    images = join(train)
    return fit_router(tower, _pooled(tower, images), images.domain, lr=RATE)


@torch.no_grad()
def route_tests(
    tower: FusedMixpertTower, held_out: Images, tests: dict[str, Images]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Calibrate every rule on held-out images, and decide on the test images.

    Args:
        tower: with a trained router.
        held_out: images of all domains that neither training nor test has.
        tests: images to route, by kind.

    Returns:
        Arrays: ``scores KIND`` (N, E) float32 and ``RULE KIND`` (N,) int8, the expert; and the threshold of each rule.
    """
    known = _pooled(tower, held_out)
    thresholds: dict[str, float] = {}
    arrays: dict[str, list[Tensor]] = {}
    for rule in RULES:
        _set(tower, rule, 0.0)
        if rule.routing != "direct":
            calibration = tower.calibrate(known, held_out.domain, max_errors=MAX_ERRORS)
            thresholds[rule.title] = calibration.strategy.threshold
    for kind, images in tests.items():
        for pixels in images.pixels.split(EVALUATION_BATCH):
            features = tower.trunk_features(as_input(pixels))
            for rule in RULES:
                _set(tower, rule, thresholds.get(rule.title, 0.0))
                routing = tower.route(features)
                arrays.setdefault(f"{rule.title} {kind}", []).append(routing.expert.to(torch.int8))
            assert routing.scores is not None  # of decided routes there are
            arrays.setdefault(f"scores {kind}", []).append(routing.scores.float())
    return {name: torch.cat(parts).numpy() for name, parts in arrays.items()}, thresholds


def _set(tower: FusedMixpertTower, rule: Rule, threshold: float) -> None:
    config = tower.config
    config.routing, config.against = rule.routing, rule.against
    config.tau = config.delta = threshold


@torch.no_grad()
def _pooled(tower: FusedMixpertTower, images: Images) -> Tensor:
    parts = images.pixels.split(EVALUATION_BATCH)
    return torch.cat([tower.router_features(as_input(part)) for part in parts])
