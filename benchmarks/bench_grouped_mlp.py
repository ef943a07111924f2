"""grouped_mlp at the MLP and the projector of the expert segment: a training step's forward and backward.

The result compared is dx; every parameter gets its gradient in the time shown.
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
from _models import BASE, NUM_EXPERTS, SO400M, TINY, route_of
from torch import Tensor

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS, why_not

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
DENSE_EXPERT = 1
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("dense", "naive_loop", "sorted_loop", "two_grouped_linear")


class Layers(NamedTuple):
    """The sizes of one pair of layers, and what is added to its result."""

    depth: int  # K
    hidden: int  # H
    width: int  # N
    activation: str
    residual: bool


_D, _I, _P = GEOMETRY.hidden, GEOMETRY.intermediate, GEOMETRY.projected
LAYERS = {
    "mlp": Layers(_D, _I, _D, "gelu_tanh", True),
    "projector": Layers(_D, _P, _P, "gelu", False),
}
CASES = {
    "ci": [("mlp", 4, "balanced")],
    "default": [(name, 4, "balanced") for name in LAYERS],
    "full": [(name, 4, kind) for name in LAYERS for kind in ("balanced", "skewed")],
}[SIZE]


class Case:
    """The tensors of one scenario, and each variant as a method that builds its call."""

    def __init__(self, layers: Layers, batch: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(batch)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            made = (torch.randn(shape, generator=generator) * std).to(DEVICE, DTYPE)
            return made.requires_grad_()

        self.layers = layers
        self.x = random(batch, GEOMETRY.tokens, layers.depth)
        self.dy = random(batch, GEOMETRY.tokens, layers.width).detach()
        self.parameters = (
            random(NUM_EXPERTS, layers.hidden, layers.depth, std=0.03),
            random(NUM_EXPERTS, layers.hidden, std=0.03),
            random(NUM_EXPERTS, layers.width, layers.hidden, std=0.03),
            random(NUM_EXPERTS, layers.width, std=0.03),
        )
        self.residual = random(*self.dy.shape).detach() if layers.residual else None
        self.expert = route_of(kind, batch)
        self.routing = Routing.forced(self.expert, NUM_EXPERTS)
        self.sorted = baselines.Sorted.of(self.expert)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A forward and backward pass that returns dx; every parameter gets its gradient too."""

        @torch.enable_grad()
        def call() -> Tensor:
            dx, *_ = torch.autograd.grad(
                forward(), (self.x, *self.parameters), self.dy, allow_unused=True
            )
            return dx

        return call

    def expert_on(self, e: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        w1, b1, w2, b2 = (p[e].to(x.dtype) for p in self.parameters)
        approximate = "tanh" if self.layers.activation == "gelu_tanh" else "none"
        y = F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)
        return y if residual is None else y + residual

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [functools.partial(self.expert_on, e) for e in range(NUM_EXPERTS)]

    @torch.enable_grad()
    def truth(self, expert: Tensor) -> Tensor:
        x = self.x.detach().float().requires_grad_()
        y = baselines.per_group(self.experts, expert, x)
        return torch.autograd.grad(y, x, self.dy.float())[0]

    def ours(self, backend: str) -> Callable[[], Tensor]:
        reason = why_not("grouped_mlp", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        return self.step(
            lambda: ops.grouped_mlp(
                self.x,
                *self.parameters,
                self.routing,
                activation=self.layers.activation,
                residual=self.residual,
                backend=backend,
            )
        )

    def two_grouped_linear(self) -> Callable[[], Tensor]:
        w1, b1, w2, b2 = self.parameters

        def forward() -> Tensor:
            h = ops.grouped_linear(self.x, w1, b1, self.routing, activation=self.layers.activation)
            return ops.grouped_linear(h, w2, b2, self.routing, residual=self.residual)

        return self.step(forward)

    def dense(self) -> Callable[[], Tensor]:
        return self.step(lambda: self.expert_on(DENSE_EXPERT, *self.inputs))

    def naive_loop(self) -> Callable[[], Tensor]:
        return self.step(lambda: baselines.per_group(self.experts, self.expert, *self.inputs))

    def sorted_loop(self) -> Callable[[], Tensor]:
        return self.step(lambda: baselines.sorted_slices(self.experts, self.sorted, *self.inputs))


def scenario(name: str, batch: int, kind: str) -> Scenario:
    case = Case(LAYERS[name], batch, kind)
    single = torch.full_like(case.expert, DENSE_EXPERT)
    ours = [Variant(f"ours_{b}", functools.partial(case.ours, b)) for b in BACKENDS]
    others = [
        Variant(
            v, getattr(case, v), functools.partial(case.truth, single) if v == "dense" else None
        )
        for v in OTHERS
    ]
    layers = case.layers
    products = layers.depth * layers.hidden + layers.hidden * layers.width
    return Scenario(
        name=f"grouped_mlp {name}, forward and backward, B={batch}, {kind}",
        truth=functools.partial(case.truth, case.expert),
        base="dense",
        variants=(*ours, *others),
        flop=3 * 2.0 * batch * GEOMETRY.tokens * products,
        info={
            "bench": "grouped_mlp",
            "geometry": f"{GEOMETRY.name} {name}",
            "batch": batch,
            "route": kind,
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize(("layers", "batch", "kind"), dict.fromkeys(CASES))
def test_grouped_mlp(
    record: Callable[..., None], layers: str, batch: int, kind: str, variant: str
) -> None:
    record(scenario, layers, batch, kind, variant=variant)
