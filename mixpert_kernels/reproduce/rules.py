"""The routing rules compared: what each decided on the test images, and what came of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixpert_kernels.backends.reference.route import decide

from .ambiguous import AMBIGUOUS
from .data import DOMAINS, MAKERS
from .routes import RULES, Rule
from .statistics import Right, labels_of, paired, summary

THRESHOLDS = np.linspace(0, 1, 41)
KINDS = (*DOMAINS, *AMBIGUOUS)

Arrays = dict[str, np.ndarray]  # what the job of the experts left, of one seed


def compare(seeds: list[Arrays], control: Right) -> list[dict[str, Any]]:
    """By kind of image and rule: how often the router is right or falls back, and what the task comes to.

    Args:
        seeds: predictions of every expert, scores and decisions, one a seed.
        control: which images the control got right.
    """
    rows = []
    for kind in KINDS:
        direct = _answers(seeds, kind, RULES[0])
        for rule in RULES:
            decided = [arrays[f"{rule.title} {kind}"] for arrays in seeds]
            outcomes = [_routed(a, kind, chosen) for a, chosen in zip(seeds, decided, strict=True)]
            accuracy, fallback = 100 * np.array(outcomes).T
            right = _answers(seeds, kind, rule)
            row = {
                "kind": kind,
                "rule": rule.title,
                "routing accuracy": summary(accuracy),
                "fallback": summary(fallback),
                "accuracy": summary(100 * right.mean(1)),
                "minus direct": paired(right, direct),
            }
            rows.append(row)
        others = {
            "teacher": _fixed(seeds, kind, _expert_of(kind)),
            "always versatile": _fixed(seeds, kind, 0),
            "joint, continued": control[kind],
        }
        for title, right in others.items():
            entry = {"kind": kind, "rule": title, "accuracy": summary(100 * right.mean(1))}
            rows.append(entry | {"minus direct": paired(right, direct)})
    return rows


def curves(seeds: list[Arrays]) -> list[dict[str, Any]]:
    """Task accuracy and fallback rate over thresholds: the clean images, and each ambiguous kind."""
    groups = {"clean": DOMAINS, **{kind: (kind,) for kind in AMBIGUOUS}}
    found = []
    for group, kinds in groups.items():
        for rule in RULES[1:]:
            points = [[_at(arrays, kinds, rule, t) for t in THRESHOLDS] for arrays in seeds]
            fallback, accuracy = 100 * np.mean(points, axis=0).T
            found.append(
                {
                    "kind": group,
                    "rule": rule.title,
                    "threshold": THRESHOLDS.round(4).tolist(),
                    "fallback": fallback.round(3).tolist(),
                    "accuracy": accuracy.round(3).tolist(),
                }
            )
    return found


def _expert_of(kind: str) -> int:
    return DOMAINS.index(MAKERS[kind][1]) + 1


def _right(arrays: Arrays, kind: str, chosen: np.ndarray) -> np.ndarray:
    """Which images (N,) the chosen experts get right."""
    answers = arrays[f"predicted {kind}"][chosen, np.arange(len(chosen))]
    return answers == labels_of(kind, len(chosen))


def _answers(seeds: list[Arrays], kind: str, rule: Rule) -> np.ndarray:
    return np.stack([_right(arrays, kind, arrays[f"{rule.title} {kind}"]) for arrays in seeds])


def _fixed(seeds: list[Arrays], kind: str, expert: int) -> np.ndarray:
    every = [arrays[f"predicted {kind}"][expert] for arrays in seeds]
    return np.stack([answers == labels_of(kind, len(answers)) for answers in every])


def _routed(arrays: Arrays, kind: str, chosen: np.ndarray) -> tuple[float, float]:
    """Share of images sent to their domain's expert, and to the versatile one although another scored best."""
    best = arrays[f"{RULES[0].title} {kind}"]
    return (chosen == _expert_of(kind)).mean(), ((chosen == 0) & (best != 0)).mean()


def _at(arrays: Arrays, kinds: tuple[str, ...], rule: Rule, threshold: float) -> np.ndarray:
    outcomes = []
    for kind in kinds:
        scores = torch.from_numpy(arrays[f"scores {kind}"])
        chosen = decide(scores, rule.routing, float(threshold), rule.against).numpy()
        _, fallback = _routed(arrays, kind, chosen)
        outcomes.append((fallback, _right(arrays, kind, chosen).mean()))
    return np.mean(outcomes, axis=0)
