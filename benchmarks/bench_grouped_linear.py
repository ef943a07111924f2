"""grouped_linear at the six shapes of the expert segment, bias, activation and residual included.

All variants know the batch's order and counts beforehand, as ours does from its Routing;
gathering and scattering count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import _baselines as baselines
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from _models import BASE, NUM_EXPERTS, ROUTES, SO400M, TINY, route_of
from torch import Tensor

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS, why_not

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
DENSE_EXPERT = 1
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = (
    "dense", "dense_gemm", "naive_loop", "sorted_loop", "grouped_mm", "gathered_bmm", "all_experts",
)  # fmt: skip


class Layer(NamedTuple):
    """One linear layer of the segment."""

    depth: int  # K
    width: int  # N
    activation: str = "none"
    residual: bool = False


_D, _I, _P = GEOMETRY.hidden, GEOMETRY.intermediate, GEOMETRY.projected
LAYERS = {
    "qkv": Layer(_D, 3 * _D),
    "out": Layer(_D, _D, residual=True),
    "fc1": Layer(_D, _I, "gelu_tanh"),
    "fc2": Layer(_I, _D, residual=True),
    "projector1": Layer(_D, _P, "gelu"),
    "projector2": Layer(_P, _P),
}
CASES = {
    "ci": [(name, 4, "balanced") for name in ("fc1", "fc2")],
    "default": [(name, 8, "balanced") for name in LAYERS],
    "full": [(name, 8, "balanced") for name in LAYERS]
    + [("fc1", b, kind) for b in (1, 4, 8) for kind in ROUTES if b > 1 or kind == "one_expert"],
}[SIZE]


def finish(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """Eager activation and residual."""
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


class Case:
    """The tensors of one scenario, and each variant as a method that builds its call."""

    def __init__(self, layer: Layer, batch: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(batch)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(DEVICE, DTYPE)

        self.layer = layer
        x = random(batch, GEOMETRY.tokens, layer.depth)
        self.inputs = (x, random(*x.shape[:2], layer.width)) if layer.residual else (x,)
        self.weight = random(NUM_EXPERTS, layer.width, layer.depth, std=0.03)
        self.bias = random(NUM_EXPERTS, layer.width, std=0.03)
        self.expert = route_of(kind, batch)
        self.routing = Routing.forced(self.expert, NUM_EXPERTS)
        self.sorted = baselines.Sorted.of(self.expert)

    def expert_on(self, e: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self.weight[e].to(x.dtype), self.bias[e].to(x.dtype)
        return finish(F.linear(x, weight, bias), self.layer.activation, residual)

    def truth(self, expert: Tensor) -> Tensor:
        return baselines.per_group(
            self.experts, expert, *(t.to(torch.float32) for t in self.inputs)
        )

    def gemm_truth(self) -> Tensor:
        x, weight = (t.to(torch.float32) for t in (self.inputs[0], self.weight[DENSE_EXPERT]))
        return F.linear(x, weight)

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [functools.partial(self.expert_on, e) for e in range(NUM_EXPERTS)]

    def ours(self, backend: str) -> Callable[[], Tensor]:
        reason = why_not("grouped_linear", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        x, *residual = self.inputs
        return lambda: ops.grouped_linear(
            x,
            self.weight,
            self.bias,
            self.routing,
            activation=self.layer.activation,
            residual=residual[0] if residual else None,
            backend=backend,
        )

    def dense(self) -> Callable[[], Tensor]:
        return lambda: self.expert_on(DENSE_EXPERT, *self.inputs)

    def dense_gemm(self) -> Callable[[], Tensor]:
        return baselines.dense_gemm(self.inputs[0], self.weight[DENSE_EXPERT])

    def naive_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.per_group(self.experts, self.expert, *self.inputs)

    def sorted_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.sorted_slices(self.experts, self.sorted, *self.inputs)

    def all_experts(self) -> Callable[[], Tensor]:
        return lambda: baselines.all_experts(self.experts, self.expert, *self.inputs)

    def gathered_bmm(self) -> Callable[[], Tensor]:
        linear = baselines.gathered_bmm(self.expert)
        x, *residual = self.inputs
        return lambda: finish(
            linear(x, self.weight, self.bias), self.layer.activation, *(residual or (None,))
        )

    def grouped_mm(self) -> Callable[[], Tensor]:
        reason = baselines.grouped_mm_reason()
        if reason is not None:
            raise Unavailable(reason)
        linear = baselines.grouped_mm(self.expert[self.sorted.order])
        x, *residual = self.inputs

        def call() -> Tensor:
            y = linear(x[self.sorted.order], self.weight, self.bias)[self.sorted.inverse]
            return finish(y, self.layer.activation, *(residual or (None,)))

        return call


def scenario(name: str, batch: int, kind: str) -> Scenario:
    case = Case(LAYERS[name], batch, kind)
    single = torch.full_like(case.expert, DENSE_EXPERT)
    ours = [Variant(f"ours_{b}", functools.partial(case.ours, b)) for b in BACKENDS]
    truths = {"dense": functools.partial(case.truth, single), "dense_gemm": case.gemm_truth}
    others = [Variant(v, getattr(case, v), truths.get(v)) for v in OTHERS]
    layer = case.layer
    return Scenario(
        name=f"grouped_linear {name} ({layer.depth} to {layer.width}), B={batch}, {kind}",
        truth=functools.partial(case.truth, case.expert),
        base="dense",
        variants=(*ours, *others),
        flop=2.0 * batch * GEOMETRY.tokens * layer.depth * layer.width,
        info={
            "bench": "grouped_linear",
            "geometry": f"{GEOMETRY.name} {name}",
            "batch": batch,
            "route": kind,
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize(("layer", "batch", "kind"), dict.fromkeys(CASES))
def test_grouped_linear(
    record: Callable[..., None], layer: str, batch: int, kind: str, variant: str
) -> None:
    record(scenario, layer, batch, kind, variant=variant)
