"""What a run needs before its first step, checked as a whole: data, an earlier checkpoint, an optimizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import load_checkpoint
from .data import ImageSet, check_every_domain, check_labels_known, domains_of, read_images
from .output import RESULTS
from .recipe import Recipe, Stage, changed_keys


@dataclass(frozen=True)
class RunData:
    """The images to learn from, and those to evaluate and to calibrate on, where there are any."""

    train: ImageSet
    test: ImageSet | None
    held_out: ImageSet | None


def read_data(recipe: Recipe) -> RunData:
    """List the recipe's images.

    Raises:
        ValueError: a data set cannot be used, a domain is empty, or the training data lacks a label of the test data.
    """
    data, kind = recipe.data, recipe.model.kind
    train = read_images(data.train, kind, data.experts)
    names = data.experts or domains_of(train)
    check_every_domain(train, names, data.train)
    others: list[ImageSet | None] = []
    for path in (data.test, data.held_out):
        found = None if path is None else read_images(path, kind, names)
        if path is not None and found is not None and kind == "label":
            check_labels_known(found, train.labels(), path)
        others.append(found)
    return RunData(train, *others)


def check_output(recipe: Recipe) -> None:
    """Raise ValueError if the output is no directory and cannot become one."""
    there = next(p for p in (recipe.output, *recipe.output.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"train: output must be a directory, got the file {there}")


def load_saved(recipe: Recipe, train: ImageSet) -> dict[str, Any] | None:
    """Return the last checkpoint in the recipe's output; None where there is none.

    Raises:
        ValueError: it is of another recipe or of other data; the message names the changed keys.
    """
    saved = load_checkpoint(recipe.output)
    if saved is None:
        return None
    changed = changed_keys(json.loads(saved["recipe"]), recipe.to_dict())
    if changed:
        raise ValueError(
            f"train: recipe must be that of the run in {recipe.output}, got changes in {', '.join(changed)}; give "
            "another output to start anew"
        )
    if saved["data"] != train.fingerprint:
        raise ValueError(
            f"train: data.train must be that of the run in {recipe.output}, got other images or labels; give another "
            "output to start anew"
        )
    return saved


def load_weights(model: nn.Module, state: dict[str, Tensor], frozen: set[str]) -> None:
    """Load a checkpoint's tensors: all of the model's but the frozen ones, which it was built with."""
    expected = model.state_dict().keys() - frozen
    if expected != state.keys():
        other = sorted(expected ^ state.keys())
        raise ValueError(
            f"train: checkpoint must hold the tensors that train, got a difference in {other[0]}"
        )
    model.load_state_dict(state, strict=False)


def finished_results(recipe: Recipe, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """The results of a run that came to its end; None of one that did not."""
    path = recipe.output / RESULTS
    if saved is None or saved["stage"] < len(recipe.stages) or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def make_optimizer(stage: Stage, tensors: list[Tensor]) -> Optimizer:
    """The stage's optimizer over the parameters of one expert, or over the shared ones; vectors are not decayed."""
    matrices = {"params": [t for t in tensors if t.ndim > 1], "weight_decay": stage.weight_decay}
    vectors = {"params": [t for t in tensors if t.ndim <= 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, stage.lr, momentum=0.9)
    return torch.optim.AdamW(groups, stage.lr)
