"""Small training runs of a tower whose experts must come out the same by every bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from _towers import KINDS, grouped, make, pixels
from torch import Tensor

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.training import ExpertOptimizer, per_expert_mean, set_stage

SIZE = KINDS["siglip"].size
# Routes of the images of each step: some steps leave one expert out, or two; expert 1 has no image in the first two.
ROUTES = ([0, 2, 0, 2], [2, 2, 2], [1, 0, 1, 2, 0], [1], [0, 1, 2, 1], [2, 0], [0, 2, 1, 1, 2])
MAKE: dict[str, Callable] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
    "adamw_foreach": functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, foreach=True),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, amsgrad=True),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.05),
    "nesterov": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.05),
}  # fmt: skip
CLIP = 0.05  # well below every gradient's norm here
State = dict[str, Tensor]


def schedule(step: int) -> float:
    """Two steps of warming up, then down."""
    return (step + 1) / 2 if step < 2 else 0.8 ** (step - 1)


def batches(
    routes: tuple = ROUTES, size: tuple[int, int] = SIZE
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, routes and goals of each step."""
    made = []
    for step, chosen in enumerate(routes):
        goal = torch.randn(len(chosen), 1, 12, generator=torch.manual_seed(100 + step))
        made.append((pixels(len(chosen), size, 50 + step), torch.tensor(chosen), goal))
    return made


def loss_of(tower: FusedMixpertTower, images: Tensor, expert: Tensor, goal: Tensor) -> Tensor:
    """A loss a sample: no product runs over the samples of a batch, whose rounding would depend on their number."""
    y = tower(images, expert=expert).last_hidden_state
    losses = (y - goal).square().mean((1, 2))
    return per_expert_mean(losses, expert, tower.config.num_experts)


def state_of(tower: FusedMixpertTower, expert: int) -> State:
    return {name: p[expert].detach().clone() for name, p in grouped(tower).items()}


def same(got: State, want: State) -> bool:
    return got.keys() == want.keys() and all(torch.equal(v, want[n]) for n, v in got.items())


def staged(kind: str = "siglip", **options: object) -> FusedMixpertTower:
    tower = make(kind, **options).train()
    set_stage(tower, "experts")
    return tower


def train_mixed(
    tower: FusedMixpertTower, optimizer: ExpertOptimizer, data: list, parts: int = 1
) -> None:
    """Steps of mixed batches; each batch in ``parts`` backward passes."""
    for images, expert, goal in data:
        for piece in torch.arange(len(expert)).tensor_split(parts):
            if len(piece):
                loss_of(tower, images[piece], expert[piece], goal[piece]).backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a: object, b: object) -> bool:
    """Whether two states are alike by every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
