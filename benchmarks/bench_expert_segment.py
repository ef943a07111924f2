"""The expert segment, two cloned layers and the projector, against all else that computes it.

Every variant gets trunk features and the expert of each tile, and pays for its own sorting, masking
and scattering. `torch.compile` is compiled for the very routing that is measured; compiling is not
timed. The captured variants replay CUDA graphs: at small batches all others wait for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import _baselines as baselines
import pytest
import torch
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
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
from mixpert_kernels.backends import why_not

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
CASES = {
    "ci": [(1, "one_expert"), (4, "skewed")],  # the second has an expert without a tile
    "default": [(1, "one_expert"), *((8, kind) for kind in ROUTES)],
    "full": [(1, "one_expert"), *((b, kind) for b in (4, 8) for kind in ROUTES)],
}[SIZE]
DENSE_EXPERT = 1


@dataclass(frozen=True)
class Setup:
    ours: FusedMixpertTower
    plain: list[PlainTower]
    exact: list[PlainTower]  # in float32: what the truth is computed with
    stacked: baselines.StackedWeights


@functools.lru_cache(maxsize=1)
def setup() -> Setup:
    ours, plain = towers(GEOMETRY)
    return Setup(ours, plain, in_float32(plain), baselines.StackedWeights(plain))


Maker = Callable[[Setup, Tensor, Tensor], Callable[[], Tensor]]


def ours(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: s.ours.expert_segment(x, Routing.forced(expert, NUM_EXPERTS))


def dense(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: s.plain[DENSE_EXPERT].segment(x)


def ours_by(backend: str, captured: bool) -> Maker:
    """All ops by one backend, where ``ours`` takes what ``auto`` takes."""

    def make(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
        reason = why_not("grouped_linear", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        segment = ours(s, x, expert)

        def call() -> Tensor:
            with baselines.only(backend):
                return segment()

        return baselines.captured(call) if captured else call

    make.__name__ = f"ours_{backend}" + "_captured" * captured
    return make


def ours_captured(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return baselines.captured(ours(s, x, expert))


def dense_captured(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return baselines.captured(dense(s, x, expert))


def naive_loop(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: baselines.naive_loop(s.plain, x, expert)


def all_experts(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: baselines.all_experts([tower.segment for tower in s.plain], expert, x)


def strong_loop(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    def segment(x: Tensor, counts: Sequence[int]) -> Tensor:
        return baselines.strong_loop(s.stacked, x, counts)

    return _sorted(segment, x, expert)


def compiled_strong_loop(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    def segment(x: Tensor, counts: Sequence[int]) -> Tensor:
        return baselines.strong_loop(s.stacked, x, counts)

    order, _, counts = baselines.Sorted.of(expert)
    return _sorted(baselines.compiled(segment, x[order], counts), x, expert)


def grouped_mm(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    reason = baselines.grouped_mm_reason()
    if reason is not None:
        raise Unavailable(reason)

    def call() -> Tensor:
        ids, order = expert.sort(stable=True)
        y = baselines.stacked_segment(s.stacked, x[order], ids, baselines.grouped_mm(ids))
        return y[order.argsort()]

    return call


def gathered_bmm(s: Setup, x: Tensor, expert: Tensor) -> Callable[[], Tensor]:
    return lambda: baselines.stacked_segment(s.stacked, x, expert, baselines.gathered_bmm(expert))


def _sorted(
    segment: Callable[[Tensor, Sequence[int]], Tensor], x: Tensor, expert: Tensor
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        order, inverse, counts = baselines.Sorted.of(expert)
        return segment(x[order], counts)[inverse]

    return call


VARIANTS = (
    ours,
    ours_captured,
    *(ours_by(backend, captured) for backend in ("triton", "cuda") for captured in (False, True)),
    dense,
    dense_captured,
    naive_loop,
    strong_loop,
    grouped_mm,
    gathered_bmm,
    all_experts,
    compiled_strong_loop,
)
OF_ONE_EXPERT = (dense, dense_captured)


def scenario(batch: int, kind: str) -> Scenario:
    s = setup()
    x = torch.randn(
        batch, GEOMETRY.tokens, GEOMETRY.hidden, generator=torch.Generator().manual_seed(batch)
    )
    x, expert = x.to(DEVICE, DTYPE), route_of(kind, batch)
    exact = [tower.segment for tower in s.exact]
    single = torch.full_like(expert, DENSE_EXPERT)

    def variant(make: Maker) -> Variant:
        truth = functools.partial(baselines.per_group, exact, single, x.to(torch.float32))
        return Variant(
            make.__name__, lambda: make(s, x, expert), truth if make in OF_ONE_EXPERT else None
        )

    return Scenario(
        name=f"expert segment, B={batch}, {kind}",
        truth=lambda: baselines.per_group(exact, expert, x.to(torch.float32)),
        flop=batch * GEOMETRY.segment_flop(),
        base="dense",
        variants=tuple(variant(make) for make in VARIANTS),
        info={"geometry": GEOMETRY.name, "batch": batch, "route": kind, "bench": "expert segment"},
    )


@pytest.mark.parametrize("variant", [make.__name__ for make in VARIANTS])
@pytest.mark.parametrize(("batch", "kind"), CASES)
def test_expert_segment(record: Callable[..., None], batch: int, kind: str, variant: str) -> None:
    record(scenario, batch, kind, variant=variant)
