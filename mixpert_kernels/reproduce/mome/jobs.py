"""What is to be run: one process each, what it needs first, and how many images or questions it goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..jobs import Job
from . import data, encoders, features, language, training
from .data import Questions
from .encoders import ENCODERS
from .model import BASE, FIRST, Arm, grow, learnt, new_model, second
from .settings import Settings
from .tasks import GROUPS

Progress = Callable[[int], None]
__all__ = ["Job", "Settings", "plan", "run_job"]


def plan(settings: Settings) -> list[Job]:
    """All jobs in an order in which they can run."""
    jobs = []
    drawn = sum(part.size for part in settings.parts())
    for seed in range(settings.seeds):
        render, llm = f"{seed}-render", f"{seed}-llm"
        jobs.append(Job(render, seed, "render", "", (), drawn))
        told = language.BATCH * settings.llm_steps
        jobs.append(Job(llm, seed, "llm", "", (), told))
        before = [llm]
        for name, steps in zip(ENCODERS, settings.encoder_steps, strict=True):
            before.append(f"{seed}-encoder-{name}")
            seen = sum(encoders.images_by_kind(name).values()) * steps + drawn
            jobs.append(Job(before[-1], seed, "encoder", name, (render,), seen))
        asked = settings.batch * settings.steps
        jobs += [Job(f"{seed}-{arm}", seed, "first", arm, tuple(before), asked) for arm in FIRST]
        after = (*before, f"{seed}-{BASE}")
        more = settings.batch * settings.more_steps
        jobs += [Job(f"{seed}-{arm}", seed, "second", arm, after, more) for arm in second(settings)]
    return jobs


def run_job(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run a job, write its arrays and return what else there is to keep of it."""
    return METHODS[job.method](job, settings, folder, progress)


def _render(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    for part in settings.parts():
        for count in data.render_part(folder, part, job.seed):
            progress(count)
    return {}


def _llm(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    model = language.train_language_model(settings, job.seed, progress)
    torch.save(model.state_dict(), folder / f"{job.name}.pt")
    return {"right": language.measure(model, job.seed, settings)}


def _encoder(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train an encoder, and compute its features of all images."""
    name, seed = job.detail, job.seed
    images = {
        split: {part.kind: data.load(folder, part, seed) for part in settings.split(split)}
        for split in ("train", "test")
    }
    model, head = encoders.train_encoder(name, images["train"], seed, settings, progress)
    torch.save(model.state_dict(), folder / f"{job.name}.pt")
    for split, kinds in images.items():
        parts = []
        for part in settings.split(split):
            parts += encoders.features(name, model, kinds[part.kind], settings)
            progress(part.size)
        features.save(features.pack(parts), features.path(folder, seed, name, split))
    return {"right": encoders.measure(name, model, head, images["test"], seed, settings)}


def _first(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Stage 1: an arm from new weights."""
    return _train_arm(job, FIRST[job.detail], settings, folder, progress, None)


def _second(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Stage 2: an arm from what ``BASE`` learnt."""
    state = torch.load(state_path(folder, job.seed, BASE), weights_only=True)
    return _train_arm(job, second(settings)[job.detail], settings, folder, progress, state)


def _train_arm(
    job: Job,
    arm: Arm,
    settings: Settings,
    folder: Path,
    progress: Progress,
    state: dict[str, torch.Tensor] | None,
) -> dict[str, Any]:
    model = load_model(arm, settings, folder, job.seed)
    if state is None:
        model.llm.requires_grad_(True)
    else:
        grow(model, state)
    training.train(
        model,
        features.load(folder, job.seed, "train", arm.encoders),
        all_questions(settings, "train", job.seed),
        settings,
        steps=settings.steps if state is None else settings.more_steps,
        rate=settings.rate if state is None else settings.more_rate,
        seed=job.seed + (0 if state is None else 500),
        progress=progress,
    )
    torch.save(learnt(model), state_path(folder, job.seed, job.detail))
    stores = features.load(folder, job.seed, "test", arm.encoders)
    arrays: dict[str, np.ndarray] = {}
    for group, questions in zip(GROUPS, all_questions(settings, "test", job.seed), strict=True):
        arrays[f"right {group}"] = training.answers(model, stores, questions).numpy()
        found = training.choices(model, questions)
        arrays |= {f"{what} {group}": values for what, values in found.items()}
    np.savez_compressed(folder / f"{job.name}.npz", **arrays)
    groups = model.trainable().items()
    return {"parameters": {name: sum(p.numel() for p in of.values()) for name, of in groups}}


METHODS: dict[str, Callable] = {
    "render": _render,
    "llm": _llm,
    "encoder": _encoder,
    "first": _first,
    "second": _second,
}


def all_questions(settings: Settings, split: str, seed: int) -> list[Questions]:
    """The questions of a split, a group at a time."""
    return [data.questions(group, settings.split(split), seed) for group in GROUPS]


def load_model(arm: Arm, settings: Settings, folder: Path, seed: int) -> Any:
    """An arm as it is before training, around the encoders and the language model of a seed."""
    llm = language.new_language_model(settings, seed)
    llm.load_state_dict(torch.load(folder / f"{seed}-llm.pt", weights_only=True))
    found = {}
    for name in arm.encoders:
        found[name] = encoders.new_encoder(name, settings)
        state = torch.load(folder / f"{seed}-encoder-{name}.pt", weights_only=True)
        found[name].load_state_dict(state)
    return new_model(arm, found, llm, settings, seed)


def state_path(folder: Path, seed: int, arm: str) -> Path:
    """What an arm learnt."""
    return folder / f"{seed}-{arm}.pt"
