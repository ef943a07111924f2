"""The training loop of all arms, and what they say to the test questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixpert_kernels.hf.mome import MomeForConditionalGeneration

from ..training import BETAS, MAX_NORM, warm_cosine
from .data import Questions
from .features import Store
from .settings import Settings

EVALUATION_BATCH = 250
Progress = Callable[[int], None]


def train(
    model: MomeForConditionalGeneration,
    stores: dict[str, Store],
    groups: list[Questions],
    settings: Settings,
    *,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> None:
    """Train what ``mome.build`` added, and the language model where it is not frozen.

    Args:
        model: trained in place.
        stores: features of the images asked about.
        groups: the questions of each group.
        settings: batch and weight decay.
        steps: how many.
        rate: peak learning rate, warmed up linearly, then a cosine to 0; the language model's is another.
        seed: of the order of the questions, the same for all arms.
        progress: is told how many questions were trained on.
    """
    groups_of = model.trainable()
    tuned = list(groups_of.pop("other", {}).values())
    own = [p for of_group in groups_of.values() for p in of_group.values()]
    parameters = own + tuned
    rates = [{"params": own, "lr": rate}, {"params": tuned, "lr": settings.tuned_rate}]
    optimizer = torch.optim.AdamW(
        [group for group in rates if group["params"]], weight_decay=settings.decay, betas=BETAS
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    model.train()
    for batch in batches(groups, settings.each, steps, seed):
        loss = run(model, stores, batch, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        progress(len(batch.ids))
    model.eval()


def run(
    model: MomeForConditionalGeneration, stores: dict[str, Store], batch: Questions, **options: Any
) -> Any:
    """The model's output for some questions."""
    images = {name: stores[name].select(batch.image) for name in model.branches}
    return model(batch.ids, images=images, instructions=batch.instruction, **options)


def batches(
    groups: list[Questions], each: tuple[int, ...], steps: int, seed: int
) -> Iterator[Questions]:
    """``steps`` batches of so many questions of each group, each group in shuffled epochs of its own."""
    pairs = enumerate(zip(groups, each, strict=True))
    streams = [_shuffled(group, count, (seed, i)) for i, (group, count) in pairs]
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        yield Questions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _shuffled(group: Questions, each: int, seed: tuple[int, int]) -> Iterator[Questions]:
    rng = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(rng.permutation(len(group.ids)))
        for index in order.split(each):
            if len(index) == each:
                yield group.select(index)


@torch.no_grad()
def answers(
    model: MomeForConditionalGeneration, stores: dict[str, Store], questions: Questions
) -> Tensor:
    """Which questions are answered right: (N,) bool.

    Every word and the end, each given the right ones before it: that is what greedy generation says, for it goes on
    with the right words as long as they are.
    """
    right = []
    for index in torch.arange(len(questions.ids)).split(EVALUATION_BATCH):
        batch = questions.select(index)
        logits = run(model, stores, batch).logits  # (B, L + T, V)
        said = logits[:, -batch.ids.shape[1] - 1 : -1].argmax(-1)
        right.append(((said == batch.labels) | (batch.labels == -100)).all(1))
    return torch.cat(right)


@torch.no_grad()
def choices(model: MomeForConditionalGeneration, questions: Questions) -> dict[str, np.ndarray]:
    """What the routers decide by each instruction: weights (N, n) of the branches, adapters (layers, N)."""
    found = {}
    if model.move.router is not None:
        found["weights"] = model.move.weights(questions.instruction).numpy()
    if model.experts > 1:
        each = [layer.probabilities(questions.instruction).argmax(1) for layer in model.layers]
        found["adapters"] = torch.stack(each).numpy().astype(np.int8)
    return found
