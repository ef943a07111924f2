"""The training loops: whole encoders with a stock AdamW, experts together with ExpertOptimizer."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from mixpert_kernels.hf.heads import Classifier
from mixpert_kernels.training import ExpertOptimizer, per_expert_mean, set_stage

from .data import EXPERTS, Images, as_input
from .model import name_experts, segment_logits, trunk_features
from .settings import Settings

WARM_UP = 0.05  # of the steps
MAX_NORM = 1.0
BETAS = (0.9, 0.98)

Progress = Callable[[int], None]  # is told how many images were trained on


def train_whole(
    model: Classifier,
    domains: list[Images],
    settings: Settings,
    *,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress,
    train_head: bool = True,
) -> None:
    """Train all of a model of one expert but its router, ``settings.batch`` images of each domain a step.

    Args:
        model: trained in place.
        domains: the images of each domain to train on; one for a task-specific encoder.
        settings: batch and weight decay.
        steps: how many.
        rate: peak learning rate: warmed up linearly, then a cosine to 0.
        seed: of the order of the images.
        progress: called after each step.
        train_head: whether the linear layer over the labels trains too.
    """
    quiet_stage(model, "joint")
    model.head.requires_grad_(train_head)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _adamw(settings, rate)(parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    for batch in batches(domains, settings.batch, steps, seed):
        loss = model(as_input(batch.pixels), batch.labels, batch.domain * 0).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        progress(len(batch.labels))


def train_experts(
    model: Classifier,
    domains: list[Images],
    settings: Settings,
    *,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> None:
    """Clone a model's one expert and train the copies at once, each domain's images through their own.

    The trunk is frozen: its features are computed once for all steps. Expert 0 sees no image and stays as it is.

    Args:
        model: of one expert, cut where the clones begin; trained in place.
        domains: the images of each domain, as in ``train_whole``.
        settings: batch and weight decay.
        steps: how many.
        rate: peak learning rate of every expert.
        seed: of the order of the images: the same images in the same order as ``train_whole``'s.
        progress: called after each step.
    """
    quiet_stage(model, "clone", num_experts=len(EXPERTS))
    name_experts(model)
    quiet_stage(model, "experts")
    model.train()
    features = [trunk_features(model.tower, images.pixels) for images in domains]
    pairs = zip(domains, features, strict=True)
    cached = [images._replace(pixels=x) for images, x in pairs]
    optimizer = ExpertOptimizer(
        model, _adamw(settings, rate), max_norm=MAX_NORM, schedule=warm_cosine(steps)
    )
    for batch in batches(cached, settings.batch, steps, seed):
        logits = segment_logits(model, batch.pixels, batch.domain)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        optimizer.zero_grad()
        per_expert_mean(losses, batch.domain, len(EXPERTS)).backward()
        optimizer.step()
        progress(len(batch.labels))


def batches(domains: list[Images], size: int, steps: int, seed: int) -> Iterator[Images]:
    """``steps`` batches of ``size`` images of each domain, each domain in shuffled epochs of its own.

    A domain's images and their order do not depend on which other domains there are.
    """
    streams = [_shuffled(images, size, seed) for images in domains]
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        yield Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _shuffled(images: Images, size: int, seed: int) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(1000 * seed + int(images.domain[0]))
    while True:
        for index in torch.randperm(len(images.labels), generator=generator).split(size):
            if len(index) == size:
                yield images.select(index)


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by the steps made before: linear up, then half a cosine down to 0."""
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2

    return factor


def quiet_stage(model: Classifier, stage: str, **options: int) -> None:
    """``set_stage`` without its table."""
    with contextlib.redirect_stdout(io.StringIO()):
        set_stage(model, stage, **options)


def _adamw(settings: Settings, rate: float) -> Callable:
    return functools.partial(
        torch.optim.AdamW, lr=rate, weight_decay=settings.decay, betas=BETAS, fused=True
    )
