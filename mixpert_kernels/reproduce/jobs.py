"""What is to be run: one process each, what it needs first, and how many images it trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixpert_kernels.hf.heads import Classifier

from . import data
from .ambiguous import AMBIGUOUS
from .data import DOMAINS, EXPERTS, Images, Part, join
from .model import name_experts, new_model, parameters, predict, recut, trunk_features
from .routes import route_tests, train_router
from .settings import Settings
from .training import quiet_stage, train_experts, train_whole

Progress = Callable[[int], None]
KINDS = (*DOMAINS, *AMBIGUOUS)


class Job(NamedTuple):
    """One process of the comparisons.

    Attributes:
        name: of its files: ``NAME.npz`` and, written last, ``NAME.json``.
        seed: of weights and images.
        method: which function runs it: of the comparisons ``render``, ``joint``, ``continued``, ``specific``,
            ``separate``, ``experts`` or ``router``.
        detail: the domain of ``specific`` and ``separate``, the number of cloned layers of ``experts``.
        after: names of the jobs that must be done first.
        images: how many it renders or trains on, for the progress bar.
    """

    name: str
    seed: int
    method: str
    detail: str
    after: tuple[str, ...]
    images: int


def plan(settings: Settings) -> list[Job]:
    """All jobs in an order in which they can run."""
    jobs = []
    for seed in range(settings.seeds):
        jobs += [
            Job(f"{seed}-render-{i}", seed, "render", str(i), (), sum(p.size for p in parts))
            for i, parts in enumerate(_render_shares(settings))
        ]
        rendered = tuple(job.name for job in jobs if job.seed == seed)
        if settings.widths:
            jobs += _pilot_jobs(settings, seed, rendered)
            continue
        joint = f"{seed}-joint"
        one = settings.batch * settings.extra_steps
        whole = settings.batch * (settings.joint_steps + settings.extra_steps)
        first = 3 * settings.batch * settings.joint_steps
        jobs.append(Job(joint, seed, "joint", "", rendered, first))
        jobs += [Job(f"{seed}-specific-{d}", seed, "specific", d, rendered, whole) for d in DOMAINS]
        after = (*rendered, joint)
        jobs.append(Job(f"{seed}-continued", seed, "continued", "", after, 3 * one))
        jobs += [
            Job(f"{seed}-experts-{n}", seed, "experts", str(n), after, 3 * one)
            for n in settings.depths
        ]
        experts = (*after, f"{seed}-experts-{settings.cloned}")
        jobs.append(Job(f"{seed}-router", seed, "router", "", experts, 3 * settings.routed))
        jobs += [Job(f"{seed}-separate-{d}", seed, "separate", d, after, one) for d in DOMAINS]
    return jobs


def _pilot_jobs(settings: Settings, seed: int, rendered: tuple[str, ...]) -> list[Job]:
    """A joint and three task-specific encoders of each width."""
    jobs = []
    steps = settings.batch * settings.pilot_steps
    for width in settings.widths:
        for which, images in (("joint", 3 * steps), *((domain, steps) for domain in DOMAINS)):
            name = f"{seed}-pilot-{width}-{which}"
            jobs.append(Job(name, seed, "pilot", f"{width} {which}", rendered, images))
    return jobs


def run_job(job: Job, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run a job, write its arrays and return what else there is to keep of it."""
    if job.method == "render":
        for part in _render_shares(settings)[int(job.detail)]:
            for count in data.render_part(folder, part, job.seed):
                progress(count)
        return {}
    arrays, notes = METHODS[job.method](job, settings, folder, progress)
    np.savez_compressed(folder / f"{job.name}.npz", **arrays)
    return notes


def _render_shares(settings: Settings) -> list[list[Part]]:
    """What to render, in two shares of like work."""
    parts = settings.parts()
    return [parts[0::2], parts[1::2]]


def _joint(job: Job, settings: Settings, folder: Path, progress: Progress):
    model = new_model(settings, job.seed)
    train_whole(
        model,
        _train_images(settings, folder, job.seed),
        settings,
        steps=settings.joint_steps,
        rate=settings.rate,
        seed=job.seed,
        progress=progress,
    )
    torch.save(model.state_dict(), _joint_path(folder, job.seed))
    return _evaluate(model, settings, folder, job.seed, KINDS)


def _continued(job: Job, settings: Settings, folder: Path, progress: Progress):
    model = load_joint(settings, folder, job.seed)
    _continue(model, _train_images(settings, folder, job.seed), settings, job, progress, True)
    return _evaluate(model, settings, folder, job.seed, KINDS)


def _separate(job: Job, settings: Settings, folder: Path, progress: Progress):
    model = load_joint(settings, folder, job.seed)
    images = [_load(settings, folder, job.seed, job.detail, "train")]
    _continue(model, images, settings, job, progress, False)
    return _evaluate(model, settings, folder, job.seed, _of_domain(job.detail))


def _specific(job: Job, settings: Settings, folder: Path, progress: Progress):
    model = new_model(settings, job.seed)
    train_whole(
        model,
        [_load(settings, folder, job.seed, job.detail, "train")],
        settings,
        steps=settings.joint_steps + settings.extra_steps,
        rate=settings.rate,
        seed=job.seed,
        progress=progress,
    )
    return _evaluate(model, settings, folder, job.seed, _of_domain(job.detail))


def _pilot(job: Job, settings: Settings, folder: Path, progress: Progress):
    """Train a joint or a task-specific encoder of another width, both for as many steps."""
    width, which = job.detail.split()
    settings = settings.of_width(int(width))
    domains = DOMAINS if which == "joint" else (which,)
    model = new_model(settings, job.seed)
    train_whole(
        model,
        [_load(settings, folder, job.seed, domain, "train") for domain in domains],
        settings,
        steps=settings.pilot_steps,
        rate=settings.rate,
        seed=job.seed,
        progress=progress,
    )
    arrays, notes = _evaluate(model, settings, folder, job.seed, domains)
    tower = model.tower
    return arrays, notes | {"parameters": parameters(tower) - parameters(tower.router)}


def _experts(job: Job, settings: Settings, folder: Path, progress: Progress):
    model = recut(load_joint(settings, folder, job.seed), int(job.detail))
    train = _train_images(settings, folder, job.seed)
    train_experts(
        model,
        train,
        settings,
        steps=settings.extra_steps,
        rate=settings.extra_rate,
        seed=job.seed + 500,
        progress=progress,
    )
    arrays = {}
    for kind in KINDS:
        test = _features(model, _load(settings, folder, job.seed, kind, "test"))
        every = [predict(model, test.pixels, e) for e in range(model.tower.config.num_experts)]
        arrays[f"predicted {kind}"] = torch.stack(every).numpy().astype(np.int8)
    torch.save(model.state_dict(), _experts_path(folder, job.seed, int(job.detail)))
    return arrays, {}


def _router(job: Job, settings: Settings, folder: Path, progress: Progress):
    """Stage R: the router alone, over the frozen trunk; then thresholds and decisions."""
    tower = load_experts(settings, folder, job.seed).tower
    train = _train_images(settings, folder, job.seed)
    accuracy = train_router(tower, [images.select(slice(settings.routed)) for images in train])
    parts = {
        split: {kind: _load(settings, folder, job.seed, kind, split) for kind in KINDS}
        for split in ("held_out", "test")
    }
    clean = join([parts["held_out"][domain] for domain in DOMAINS])
    arrays, thresholds = route_tests(tower, clean, parts["test"])
    progress(job.images)
    return arrays, {"router train accuracy": accuracy, "thresholds": thresholds}


METHODS: dict[str, Callable] = {
    "joint": _joint,
    "continued": _continued,
    "specific": _specific,
    "separate": _separate,
    "experts": _experts,
    "router": _router,
    "pilot": _pilot,
}


def load_joint(settings: Settings, folder: Path, seed: int) -> Classifier:
    """The model that the joint stage of a seed left."""
    model = new_model(settings, seed)
    model.load_state_dict(torch.load(_joint_path(folder, seed), weights_only=True))
    return model


def load_experts(settings: Settings, folder: Path, seed: int) -> Classifier:
    """The experts of the main comparison of a seed; its router is not trained."""
    model = recut(load_joint(settings, folder, seed), settings.cloned)
    quiet_stage(model, "clone", num_experts=len(EXPERTS))
    name_experts(model)
    path = _experts_path(folder, seed, settings.cloned)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _experts_path(folder: Path, seed: int, cloned: int) -> Path:
    return folder / f"{seed}-experts-{cloned}.pt"


def _joint_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed}-joint.pt"


def _continue(
    model: Classifier,
    images: list[Images],
    settings: Settings,
    job: Job,
    progress: Progress,
    train_head: bool,
) -> None:
    train_whole(
        model,
        images,
        settings,
        steps=settings.extra_steps,
        rate=settings.extra_rate,
        seed=job.seed + 500,
        progress=progress,
        train_head=train_head,
    )


def _evaluate(
    model: Classifier, settings: Settings, folder: Path, seed: int, kinds: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a model of one expert says to each test image, and its accuracy on a part of its training images."""
    arrays = {}
    for kind in kinds:
        test = _features(model, _load(settings, folder, seed, kind, "test"))
        arrays[f"predicted {kind}"] = predict(model, test.pixels).numpy().astype(np.int8)
    notes = {}
    for domain in set(kinds) & set(DOMAINS):
        seen = _load(settings, folder, seed, domain, "train").select(slice(settings.test))
        right = predict(model, trunk_features(model.tower, seen.pixels)) == seen.labels
        notes[f"train accuracy {domain}"] = float(right.float().mean())
    return arrays, notes


def _of_domain(domain: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if data.MAKERS[kind][1] == domain)


def _features(model: Classifier, images: Images) -> Images:
    """The images with trunk features in the place of their pixels."""
    features: Tensor = trunk_features(model.eval().tower, images.pixels)
    return images._replace(pixels=features)


def _load(settings: Settings, folder: Path, seed: int, kind: str, split: str) -> Images:
    return data.load(folder, settings.part(kind, split), seed)


def _train_images(settings: Settings, folder: Path, seed: int) -> list[Images]:
    return [_load(settings, folder, seed, domain, "train") for domain in DOMAINS]
