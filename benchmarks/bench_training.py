"""A training step's forward and backward through the expert segment, in the stage that trains the experts.

The trunk is frozen, so trunk features ask for no gradient; every parameter of the experts and the projector does.
Checked are the output and the gradient of the first layer's fc1, exact zeros for experts without an image included.
`saved MB` is what autograd keeps between forward and backward, parameters and the batch itself left out: counted
tensor by tensor, so it is the same in every run.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import _baselines as baselines
import pytest
import torch
from _harness import DEVICE, DTYPE, SIZE, Output, Scenario, Variant
from _memory import saved_megabytes
from _models import (
    BASE,
    NUM_EXPERTS,
    ROUTES,
    SO400M,
    TINY,
    PlainTower,
    in_float32,
    route_of,
    towers,
)
from torch import Tensor

from mixpert_kernels import FusedMixpertTower, Routing

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
CASES = {
    "ci": [(4, "skewed")],
    "default": [(8, kind) for kind in ROUTES],
    "full": [(4, "balanced"), (4, "skewed")],
}[SIZE]
DENSE_EXPERT = 1


@dataclass(frozen=True)
class Setup:
    ours: FusedMixpertTower
    checkpointed: FusedMixpertTower
    plain: list[PlainTower]
    exact: list[PlainTower]  # in float32: what the truth is computed with
    stacked: baselines.StackedWeights


@dataclass(frozen=True)
class Step:
    """One way to run the segment, the parameters it trains, and among their gradients those of fc1."""

    forward: Callable[[], Tensor]
    parameters: list[Tensor]
    fc1: list[int]  # places in `parameters`: one of all experts, or one an expert

    def __call__(self) -> Output:
        with torch.enable_grad():
            y = self.forward()
            dy = torch.ones_like(y)
            dy[..., ::2] = -0.5  # not the same everywhere: sums would cancel in LayerNorms
            gradients = torch.autograd.grad(y, self.parameters, dy, allow_unused=True)
        found = [
            torch.zeros_like(self.parameters[i]) if gradients[i] is None else gradients[i]
            for i in self.fc1
        ]
        return y.detach(), found[0] if len(found) == 1 else torch.stack(found)


@functools.lru_cache(maxsize=1)
def setup() -> Setup:
    ours, plain = towers(GEOMETRY)
    ours.trunk.requires_grad_(False)
    checkpointed = copy.deepcopy(ours).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    stacked = baselines.StackedWeights(plain)
    for parameter in stacked.parameters():
        parameter.requires_grad_()
    return Setup(ours, checkpointed, plain, in_float32(plain), stacked)


def ours(s: Setup, x: Tensor, expert: Tensor) -> Step:
    return _of_tower(s.ours, x, expert)


def ours_checkpointed(s: Setup, x: Tensor, expert: Tensor) -> Step:
    return _of_tower(s.checkpointed, x, expert)


def _of_tower(tower: FusedMixpertTower, x: Tensor, expert: Tensor) -> Step:
    named = dict(tower.experts.named_parameters()) | {
        f"projector.{name}": p for name, p in tower.projector.named_parameters()
    }
    fc1 = list(named).index("0.block.mlp.fc1.weight")
    routing = Routing.forced(expert, NUM_EXPERTS)
    return Step(lambda: tower.expert_segment(x, routing), list(named.values()), [fc1])


def dense(s: Setup, x: Tensor, expert: Tensor) -> Step:
    return _of_plain(s.plain, lambda: s.plain[DENSE_EXPERT].segment(x))


def naive_loop(s: Setup, x: Tensor, expert: Tensor) -> Step:
    return _of_plain(s.plain, lambda: baselines.naive_loop(s.plain, x, expert))


def _of_plain(plain: Sequence[PlainTower], forward: Callable[[], Tensor]) -> Step:
    parameters = [p for t in plain for part in (t.layers, t.projector) for p in part.parameters()]
    places = {id(p): i for i, p in enumerate(parameters)}
    return Step(forward, parameters, [places[id(t.layers[0].mlp.fc1.weight)] for t in plain])


def strong_loop(s: Setup, x: Tensor, expert: Tensor) -> Step:
    def forward() -> Tensor:
        order, inverse, counts = baselines.Sorted.of(expert)
        return baselines.strong_loop(s.stacked, x[order], counts)[inverse]

    return _of_stacked(s.stacked, forward)


def gathered_bmm(s: Setup, x: Tensor, expert: Tensor) -> Step:
    linear = baselines.gathered_bmm(expert)
    return _of_stacked(s.stacked, lambda: baselines.stacked_segment(s.stacked, x, expert, linear))


def _of_stacked(stacked: baselines.StackedWeights, forward: Callable[[], Tensor]) -> Step:
    parameters = stacked.parameters()
    places = {id(p): i for i, p in enumerate(parameters)}
    return Step(forward, parameters, [places[id(stacked.layers[0]["fc1"][0])]])


VARIANTS = (ours, ours_checkpointed, dense, naive_loop, strong_loop, gathered_bmm)


def scenario(batch: int, kind: str) -> Scenario:
    s = setup()
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, GEOMETRY.tokens, GEOMETRY.hidden, generator=generator)
    x, expert = x.to(DEVICE, DTYPE), route_of(kind, batch)

    def exact(expert: Tensor) -> Output:
        segments = [tower.segment for tower in s.exact]
        wide = x.to(torch.float32)
        return _of_plain(s.exact, lambda: baselines.per_group(segments, expert, wide))()

    def variant(make: Callable[[Setup, Tensor, Tensor], Step]) -> Variant:
        step = make(s, x, expert)
        single = torch.full_like(expert, DENSE_EXPERT)
        return Variant(
            make.__name__,
            lambda: step,
            functools.partial(exact, single) if make is dense else None,
            {"saved_mb": saved_megabytes(step.forward, [x, *step.parameters])},
        )

    return Scenario(
        name=f"training step, B={batch}, {kind}",
        truth=lambda: exact(expert),
        flop=3 * batch * GEOMETRY.segment_flop(),
        base="dense",
        variants=tuple(variant(make) for make in VARIANTS),
        info={"geometry": GEOMETRY.name, "batch": batch, "route": kind, "bench": "training step"},
    )


@pytest.mark.parametrize("variant", [make.__name__ for make in VARIANTS])
@pytest.mark.parametrize(("batch", "kind"), CASES)
def test_training(record: Callable[..., None], batch: int, kind: str, variant: str) -> None:
    record(scenario, batch, kind, variant=variant)
