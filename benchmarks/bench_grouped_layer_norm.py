"""grouped_layer_norm at the width of the expert segment: a matter of memory traffic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import _baselines as baselines
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from _models import BASE, NUM_EXPERTS, SO400M, TINY, route_of
from torch import Tensor

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS, why_not

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
CASES = {
    "ci": [(4, "balanced")],
    "default": [(8, "balanced")],
    "full": [(1, "one_expert"), (8, "balanced"), (8, "skewed")],
}[SIZE]
EPS = 1e-6
DENSE_EXPERT = 1
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("dense", "naive_loop", "sorted_loop", "gathered_gain", "all_experts")


class Case:
    """The tensors of one scenario, and each variant as a method that builds its call."""

    def __init__(self, batch: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, GEOMETRY.tokens, GEOMETRY.hidden)
        self.x = torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
        gain = torch.randn(2, NUM_EXPERTS, GEOMETRY.hidden, generator=generator).to(DEVICE, DTYPE)
        self.weight, self.bias = gain[0] + 1, gain[1]
        self.expert = route_of(kind, batch)
        self.routing = Routing.forced(self.expert, NUM_EXPERTS)
        self.sorted = baselines.Sorted.of(self.expert)

    def expert_on(self, e: int, x: Tensor) -> Tensor:
        weight, bias = self.weight[e].to(x.dtype), self.bias[e].to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    def truth(self, expert: Tensor) -> Tensor:
        return baselines.per_group(self.experts, expert, self.x.to(torch.float32))

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [functools.partial(self.expert_on, e) for e in range(NUM_EXPERTS)]

    def ours(self, backend: str) -> Callable[[], Tensor]:
        reason = why_not("grouped_layer_norm", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        return lambda: ops.grouped_layer_norm(
            self.x, self.weight, self.bias, self.routing, eps=EPS, backend=backend
        )

    def dense(self) -> Callable[[], Tensor]:
        return lambda: self.expert_on(DENSE_EXPERT, self.x)

    def naive_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.per_group(self.experts, self.expert, self.x)

    def sorted_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.sorted_slices(self.experts, self.sorted, self.x)

    def all_experts(self) -> Callable[[], Tensor]:
        return lambda: baselines.all_experts(self.experts, self.expert, self.x)

    def gathered_gain(self) -> Callable[[], Tensor]:
        def call() -> Tensor:
            normalised = F.layer_norm(self.x, self.x.shape[-1:], eps=EPS)
            gain, offset = self.weight[self.expert, None], self.bias[self.expert, None]
            return torch.addcmul(offset, normalised, gain)

        return call


def scenario(batch: int, kind: str) -> Scenario:
    case = Case(batch, kind)
    single = torch.full_like(case.expert, DENSE_EXPERT)
    ours = [Variant(f"ours_{b}", functools.partial(case.ours, b)) for b in BACKENDS]
    others = [
        Variant(
            v, getattr(case, v), functools.partial(case.truth, single) if v == "dense" else None
        )
        for v in OTHERS
    ]
    return Scenario(
        name=f"grouped_layer_norm ({GEOMETRY.hidden}), B={batch}, {kind}",
        truth=functools.partial(case.truth, case.expert),
        base="dense",
        variants=(*ours, *others),
        moved=2.0 * case.x.numel() * case.x.element_size(),
        info={
            "bench": "grouped_layer_norm",
            "geometry": GEOMETRY.name,
            "batch": batch,
            "route": kind,
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize(("batch", "kind"), CASES)
def test_grouped_layer_norm(
    record: Callable[..., None], batch: int, kind: str, variant: str
) -> None:
    record(scenario, batch, kind, variant=variant)
