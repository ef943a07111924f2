"""Pixels to projected features: our tower and its router against the model it came from.

`dense` is the plain transformers encoder and projector with one expert, no post-norm and no pooling
head. The two `torch.compile` variants are of that dense tower; the frozen one may reorder weights
beforehand, as our CPU backend does. The captured variants replay CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import _baselines as baselines
import pytest
import torch
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from _models import BASE, SO400M, TINY, Geometry, PlainTower, in_float32, route_of, towers
from torch import Tensor

from mixpert_kernels import FusedMixpertTower

CASES = {
    "ci": [(TINY, 4, "balanced")],
    "default": [(BASE, 8, "balanced")],
    "full": [(BASE, 8, "balanced"), (BASE, 8, "one_expert"), (SO400M, 8, "balanced")],
}[SIZE]
DENSE_EXPERT = 1


@dataclass(frozen=True)
class Setup:
    ours: FusedMixpertTower
    plain: list[PlainTower]
    exact: list[PlainTower]  # in float32: what the truth is computed with


@functools.lru_cache(maxsize=1)
def setup(geometry: Geometry) -> Setup:
    ours, plain = towers(geometry)
    return Setup(ours, plain, in_float32(plain))


def ours(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: s.ours(pixels, expert=expert, output_router=True).last_hidden_state


def ours_captured(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    if DEVICE.type != "cuda":
        raise Unavailable("needs a CUDA device")
    fast = s.ours.capture([len(pixels)], forced=True)
    return lambda: fast(pixels, expert=expert, copy=False).last_hidden_state


def dense_captured(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return baselines.captured(dense(s, pixels, expert))


def dense(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: s.plain[DENSE_EXPERT](pixels)


def compiled_dense(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return functools.partial(baselines.compiled(s.plain[DENSE_EXPERT], pixels), pixels)


def compiled_frozen_dense(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return functools.partial(baselines.compiled(s.plain[DENSE_EXPERT], pixels, freeze=True), pixels)


def naive_loop(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: baselines.naive_loop(s.plain, s.plain[0].trunk_features(pixels), expert)


def all_experts(s: Setup, pixels: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    segments = [tower.segment for tower in s.plain]
    return lambda: baselines.all_experts(segments, expert, s.plain[0].trunk_features(pixels))


OF_ONE_EXPERT = (dense, dense_captured, compiled_dense, compiled_frozen_dense)
VARIANTS = (ours, ours_captured, *OF_ONE_EXPERT, naive_loop, all_experts)


def scenario(geometry: Geometry, batch: int, kind: str) -> Scenario:
    s = setup(geometry)
    side = geometry.image
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))
    pixels, expert = pixels.to(DEVICE, DTYPE), route_of(kind, batch)
    single = torch.full_like(expert, DENSE_EXPERT)
    exact = pixels.to(torch.float32)

    def variant(make: Callable[[Setup, Tensor, Tensor], Callable[[], Tensor]]) -> Variant:
        single_truth = functools.partial(baselines.per_group, s.exact, single, exact)
        own_truth = single_truth if make in OF_ONE_EXPERT else None
        return Variant(make.__name__, lambda: make(s, pixels, expert), own_truth)

    return Scenario(
        name=f"tower, {geometry.name} ({geometry.layers} layers), B={batch}, {kind}",
        truth=lambda: baselines.per_group(s.exact, expert, exact),
        flop=batch * geometry.tower_flop(),
        base="dense",
        variants=tuple(variant(make) for make in VARIANTS),
        info={"geometry": geometry.name, "batch": batch, "route": kind, "bench": "tower"},
    )


@pytest.mark.parametrize("variant", [make.__name__ for make in VARIANTS])
@pytest.mark.parametrize(
    ("geometry", "batch", "kind"), CASES, ids=lambda value: getattr(value, "name", None)
)
def test_tower(
    record: Callable[..., None], geometry: Geometry, batch: int, kind: str, variant: str
) -> None:
    record(scenario, geometry, batch, kind, variant=variant)
