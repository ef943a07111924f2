"""The files a run leaves besides its checkpoint and metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration import Calibration
from .checkpoint import save_whole, write_text_whole
from .confusion import Routes, draw_routes, print_routes
from .curve import draw_curve
from .data import Sample
from .recipe import Recipe
from .stages import find_tower

if TYPE_CHECKING:
    from mixpert_kernels.hf.heads import Classifier, PrefixLM

RESULTS = "results.json"
FEATURES = "router-features.pt"
NAN_BATCH = "nan-batch.json"
CALIBRATION = "calibration.json"
CURVE = "calibration.png"
ROUTES = "routing.png"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")


def save_model(model: Classifier | PrefixLM, recipe: Recipe) -> None:
    """Save the tower, with its checkpoint's preprocessing, and the head, each directory whole or not at all."""
    from mixpert_kernels.hf.checkpoint import write_whole

    def write_tower(draft: Path) -> None:
        find_tower(model).save_pretrained(draft)
        for name in PREPROCESSING:
            if recipe.model.vision is not None and (recipe.model.vision / name).is_file():
                shutil.copyfile(recipe.model.vision / name, draft / name)

    write_whole(recipe.output / "tower", write_tower)
    write_whole(recipe.output / "head", model.save_head)


def save_features(output: Path, key: str, features: Tensor, domains: Tensor) -> None:
    """Keep what the router learns from; ``key`` says what it follows from."""
    save_whole(output / FEATURES, {"key": key, "features": features, "domains": domains})


def load_features(output: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """Return the features (N, D) and domains (N,) that were saved under ``key``; None where there are none."""
    if not (output / FEATURES).is_file():
        return None
    saved = torch.load(output / FEATURES, map_location="cpu", weights_only=True)
    return (saved["features"], saved["domains"]) if saved["key"] == key else None


def write_calibration(
    output: Path, result: Calibration, report: dict[str, Any], versatile: str
) -> None:
    """Write the report and, with matplotlib, the curve's picture; print what was chosen."""
    write_text_whole(output / CALIBRATION, json.dumps(report, indent=2) + "\n")
    best = result.chosen
    print(
        f"calibrated {report['threshold']} = {report['value']:g} on {report['images']} images: accuracy "
        f"{best.accuracy:.1%}, fallback {best.fallback:.1%}, wrong expert {best.errors:.1%}"
    )
    if _can_draw(CURVE):
        draw_curve(output / CURVE, result, report["threshold"], versatile)


def write_routes(output: Path, routes: Routes) -> None:
    """Print where the images of each domain went and, with matplotlib, draw it."""
    print_routes(routes)
    if _can_draw(ROUTES):
        draw_routes(output / ROUTES, routes)


def _can_draw(name: str) -> bool:
    there = find_spec("matplotlib") is not None
    if not there:
        print(f'matplotlib is not installed, so {name} is not drawn: pip install -e ".[train]"')
    return there


def write_nan_batch(
    output: Path, stage: str, step: int, loss: float, samples: Sequence[Sample]
) -> Path:
    """Write which images the batch had whose loss is not finite."""
    images = [{"image": sample.name, "domain": sample.domain} for sample in samples]
    found = {"stage": stage, "step": step, "loss": str(loss), "images": images}
    write_text_whole(output / NAN_BATCH, json.dumps(found, indent=2) + "\n")
    return output / NAN_BATCH


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Write ``results.json``, the last thing a run does."""
    write_text_whole(output / RESULTS, json.dumps(results, indent=2) + "\n")
