"""From the arrays that the jobs left to the numbers of the report: ``results.json``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixpert_kernels

from . import rules
from .ambiguous import AMBIGUOUS
from .data import DOMAINS, MAKERS
from .jobs import plan
from .settings import QUICK, Settings
from .statistics import Right, differences, labels_of, table_of
from .worker import write_json

DEFAULT = "score difference"
DIRECT = "mixpert direct"
METHODS = ("joint", "continued", "specific", "separate", "mixpert", "mixpert routed")
PAIRS = (
    ("mixpert", "joint"),
    ("mixpert", "continued"),
    ("mixpert", "specific"),
    ("mixpert", "separate"),
    ("mixpert routed", "mixpert"),
    ("mixpert routed", "mixpert direct"),
    ("mixpert routed", "continued"),
    ("specific", "joint"),
    ("continued", "joint"),
)
PILOT, RESULTS = "pilot.json", "results.json"


def gather(
    folder: Path, settings: Settings, cost: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Compute all numbers of the report and write them to ``results.json``.

    Args:
        folder: where all jobs are done.
        settings: of the run.
        cost: what ``cost.measure`` returned.
        seconds: that this process took, from start to end.

    Returns:
        What was written: plain lists, dicts, strings and numbers; accuracies in percent.
    """
    right: dict[str, Right] = {
        method: _right(folder, settings, method, settings.cloned) for method in (*METHODS, DIRECT)
    }
    notes = {job.name: read_note(folder / f"{job.name}.json") for job in plan(settings)}
    experts = [experts_of(folder, settings, seed) for seed in range(settings.seeds)]
    found = {
        "settings": asdict(settings),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "cpu seconds": round(sum(note["cpu seconds"] for note in notes.values()), 1),
        "accuracy": {method: table_of(images) for method, images in right.items()},
        "differences": [{"of": a, "minus": b, **differences(right[a], right[b])} for a, b in PAIRS],
        "depth": _depths(folder, settings, right),
        "routing": rules.compare(experts, right["continued"]),
        "thresholds": [notes[f"{seed}-router"]["thresholds"] for seed in range(settings.seeds)],
        "curves": rules.curves(experts),
        "train accuracy": _train_accuracy(notes, settings),
        "cost": cost,
        "pilot": read_note(folder / PILOT) or [],
        "command": "mixpert reproduce" + (" --quick" if settings == QUICK else ""),
    }
    write_json(folder / RESULTS, found)
    return found


def pilot(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    """Accuracy in percent of joint and task-specific encoders by width."""
    rows = []
    for width in settings.widths:
        row: dict[str, Any] = {"width": width, "steps": settings.pilot_steps}
        row |= {"joint": {}, "specific": {}}
        for domain in DOMAINS:
            for method, which in (("joint", "joint"), ("specific", domain)):
                name = f"0-pilot-{width}-{which}"
                predicted = arrays_of(folder, name)[f"predicted {domain}"]
                right = predicted == labels_of(domain, len(predicted))
                row[method][domain] = round(100 * float(right.mean()), 3)
        notes = read_note(folder / f"0-pilot-{width}-joint.json")
        rows.append(row | {"parameters": notes["parameters"]})
    return rows


def _right(folder: Path, settings: Settings, method: str, cloned: int) -> Right:
    """Which test images a method got right."""
    seeds = range(settings.seeds)
    return {
        kind: np.stack([_right_of_seed(folder, method, seed, kind, cloned) for seed in seeds])
        for kind in (*DOMAINS, *AMBIGUOUS)
    }


def _right_of_seed(folder: Path, method: str, seed: int, kind: str, cloned: int) -> np.ndarray:
    domain = MAKERS[kind][1]
    if method.startswith("mixpert"):
        predicted = arrays_of(folder, f"{seed}-experts-{cloned}")[f"predicted {kind}"]  # (E, N)
        expert: Any = DOMAINS.index(domain) + 1
        if method != "mixpert":
            rule = "direct" if method == DIRECT else DEFAULT
            expert = arrays_of(folder, f"{seed}-router")[f"{rule} {kind}"]
        predicted = predicted[expert, np.arange(predicted.shape[1])]
    else:
        alone = method in ("specific", "separate")
        arrays = arrays_of(folder, f"{seed}-{method}-{domain}" if alone else f"{seed}-{method}")
        predicted = arrays[f"predicted {kind}"]
    return predicted == labels_of(kind, len(predicted))


def experts_of(folder: Path, settings: Settings, seed: int) -> dict[str, np.ndarray]:
    """What the experts of the main comparison say to each test image, and where its router sends it."""
    predicted = arrays_of(folder, f"{seed}-experts-{settings.cloned}")
    return predicted | arrays_of(folder, f"{seed}-router")


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays that a job left."""
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def _depths(folder: Path, settings: Settings, right: dict[str, Right]) -> list[dict[str, Any]]:
    """By number of cloned layers: accuracy under teacher routing, and against ``continued``."""
    rows = []
    for depth in settings.depths:
        images = _right(folder, settings, "mixpert", depth)
        rows.append((str(depth), images))
    rows.append(("all", right["separate"]))
    return [
        {
            "cloned": name,
            "accuracy": table_of(images),
            "minus continued": differences(images, right["continued"]),
            "minus joint": differences(images, right["joint"]),
        }
        for name, images in rows
    ]


def _train_accuracy(notes: dict[str, Any], settings: Settings) -> dict[str, dict[str, float]]:
    """Mean over seeds of the accuracy on a part of the training images, in percent."""
    found: dict[str, dict[str, float]] = {}
    for method in ("joint", "continued", "specific", "separate"):
        found[method] = {}
        for domain in DOMAINS:
            alone = method in ("specific", "separate")
            names = [
                f"{s}-{method}-{domain}" if alone else f"{s}-{method}"
                for s in range(settings.seeds)
            ]
            values = [notes[name][f"train accuracy {domain}"] for name in names]
            found[method][domain] = round(100 * float(np.mean(values)), 2)
    return found


def read_note(path: Path) -> Any:
    """What a JSON file of a run holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "mixpert_kernels": mixpert_kernels.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
