"""From the arrays that the jobs left to the numbers of the report: ``results.json``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..results import RESULTS, arrays_of, read_note, versions
from ..statistics import Right, differences, summary, table_of
from ..worker import write_json
from .encoders import ENCODERS, SEEN
from .jobs import plan
from .model import FIRST, second
from .settings import QUICK, Settings
from .tasks import GROUPS

PAIRS = (
    ("pool+addition", "clip"),
    ("adt+addition", "pool+addition"),
    ("adt+router", "adt+addition"),
    ("mole", "adt+router"),
    ("mole", "one"),
    ("mole", "wide"),
    ("one", "adt+router"),
    ("wide", "one"),
)


def gather(folder: Path, settings: Settings, seconds: float) -> dict[str, Any]:
    """Compute all numbers of the report and write them to ``results.json``.

    Args:
        folder: where all jobs are done.
        settings: of the run.
        seconds: that it took, from start to end.

    Returns:
        What was written: plain lists, dicts, strings and numbers; accuracies and shares in percent.
    """
    notes = {job.name: read_note(folder / f"{job.name}.json") for job in plan(settings)}
    arms = (*FIRST, *second(settings))
    seeds = range(settings.seeds)
    arrays = {arm: [arrays_of(folder, f"{seed}-{arm}") for seed in seeds] for arm in arms}
    right: dict[str, Right] = {
        arm: {group: np.stack([a[f"right {group}"] for a in each]) for group in GROUPS}
        for arm, each in arrays.items()
    }
    found = {
        "settings": asdict(settings),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "cpu seconds": round(sum(note["cpu seconds"] for note in notes.values()), 1),
        "seconds by job": _seconds(notes),
        "encoders": {
            name: _alone(notes, f"encoder-{name}", SEEN[name], seeds) for name in ENCODERS
        },
        "language model": _alone(notes, "llm", GROUPS, seeds),
        "accuracy": {arm: table_of(images, GROUPS) for arm, images in right.items()},
        "differences": [
            {"of": a, "minus": b, **differences(right[a], right[b], GROUPS)} for a, b in PAIRS
        ],
        "weights": {
            arm: _weights(each) for arm, each in arrays.items() if f"weights {GROUPS[0]}" in each[0]
        },
        "adapters": [_adapters(of_seed, settings.experts) for of_seed in arrays["mole"]],
        "parameters": {arm: notes[f"0-{arm}"]["parameters"] for arm in arms},
        "command": "mixpert reproduce mome" + (" --quick" if settings == QUICK else ""),
    }
    write_json(folder / RESULTS, found)
    return found


def _seconds(notes: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of each job but for its seed, mean over seeds."""
    found: dict[str, list[float]] = {}
    for name, note in notes.items():
        found.setdefault(name.split("-", 1)[1], []).append(note["cpu seconds"])
    return {name: round(float(np.mean(values)), 1) for name, values in found.items()}


def _alone(notes: dict[str, Any], job: str, keys: tuple[str, ...], seeds: range) -> dict[str, Any]:
    """What a frozen part of the models can do, over seeds."""
    values = {key: [notes[f"{seed}-{job}"]["right"][key] for seed in seeds] for key in keys}
    return {key: summary(np.array(each)) for key, each in values.items()}


def _weights(arrays: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """By group and encoder, the router's weight: mean over test questions, over seeds."""
    means = {g: np.stack([100 * a[f"weights {g}"].mean(0) for a in arrays]) for g in GROUPS}
    return {
        group: {name: summary(values[:, i]) for i, name in enumerate(ENCODERS)}
        for group, values in means.items()
    }


def _adapters(arrays: dict[str, np.ndarray], experts: int) -> list[dict[str, Any]]:
    """By layer: the share of each group's test questions that each adapter gets, and what the two know of each other.

    ``information``: of group and adapter, in bits, all groups counted alike; at most 2.
    """
    layers = []
    for layer in range(len(arrays[f"adapters {GROUPS[0]}"])):
        shares = np.stack(
            [
                np.bincount(arrays[f"adapters {group}"][layer], minlength=experts)
                / arrays[f"adapters {group}"].shape[1]
                for group in GROUPS
            ]
        )  # (groups, K)
        rows = zip(GROUPS, (100 * shares).round(2).tolist(), strict=True)
        layers.append({"shares": dict(rows), "information": round(information(shares), 3)})
    return layers


def information(shares: np.ndarray) -> float:
    """Mutual information in bits of a row, all as likely, and the column, (rows, columns) its shares."""
    joint = shares / len(shares)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / apart[there])).sum())
