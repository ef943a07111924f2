"""route_grouped_linear (router, first LayerNorm, QKV) against the three ops, and against eager PyTorch.

`dense` is one expert's LayerNorm and QKV without a router: what is left of `ours` beyond it is the price of routing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import _baselines as baselines
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from _models import BASE, NUM_EXPERTS, SO400M, TINY
from torch import Tensor

from mixpert_kernels import ops
from mixpert_kernels.backends import BACKENDS, why_not

GEOMETRY = {"ci": TINY, "default": BASE, "full": SO400M}[SIZE]
BATCHES = {"ci": (4,), "default": (8,), "full": (1, 8, 32)}[SIZE]
STRATEGY = ops.Strategy("direct")
EPS = 1e-6
DENSE_EXPERT = 1
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("dense", "three_ops", "naive_loop")


class Case:
    """The tensors of one scenario, and each variant as a method that builds its call."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        width = GEOMETRY.hidden

        def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std + mean).to(DEVICE, DTYPE)

        self.x = random(batch, GEOMETRY.tokens, width) + random(batch, 1, width)  # images differ
        self.router = ops.RouterWeights(
            random(width, mean=1.0),
            random(width),
            None,
            None,
            random(NUM_EXPERTS, width, std=width**-0.5),
            random(NUM_EXPERTS),
        )
        self.gain = random(NUM_EXPERTS, width, mean=1.0)
        self.offset = random(NUM_EXPERTS, width)
        self.weight = random(NUM_EXPERTS, 3 * width, width, std=0.03)
        self.bias = random(NUM_EXPERTS, 3 * width, std=0.03)

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [functools.partial(self.expert_on, e) for e in range(NUM_EXPERTS)]

    def expert_on(self, e: int, x: Tensor) -> Tensor:
        gain, offset, weight, bias = (
            t[e].to(x.dtype) for t in (self.gain, self.offset, self.weight, self.bias)
        )
        return F.linear(F.layer_norm(x, x.shape[-1:], gain, offset, EPS), weight, bias)

    def eager_route(self) -> Tensor:
        gain, offset, _, _, weight, bias = (None if t is None else t.float() for t in self.router)
        z = F.layer_norm(self.x.mean(1, dtype=torch.float32), gain.shape, gain, offset)
        return F.linear(z, weight, bias).argmax(-1)

    def truth(self, expert: Tensor) -> Tensor:
        return baselines.per_group(self.experts, expert, self.x.float())

    def ours(self, backend: str) -> Callable[[], Tensor]:
        reason = why_not("route_grouped_linear", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        given = (self.x, self.router, STRATEGY, self.gain, self.offset, self.weight, self.bias)
        return lambda: ops.route_grouped_linear(*given, norm_eps=EPS, backend=backend).y

    def dense(self) -> Callable[[], Tensor]:
        return lambda: self.expert_on(DENSE_EXPERT, self.x)

    def three_ops(self) -> Callable[[], Tensor]:
        def call() -> Tensor:
            routing = ops.route(self.x, self.router, STRATEGY)
            h = ops.grouped_layer_norm(self.x, self.gain, self.offset, routing, eps=EPS)
            return ops.grouped_linear(h, self.weight, self.bias, routing)

        return call

    def naive_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.per_group(self.experts, self.eager_route(), self.x)


def scenario(batch: int) -> Scenario:
    case = Case(batch)
    single = torch.full((batch,), DENSE_EXPERT, device=DEVICE)
    ours = [Variant(f"ours_{b}", functools.partial(case.ours, b)) for b in BACKENDS]
    others = [
        Variant(
            v, getattr(case, v), functools.partial(case.truth, single) if v == "dense" else None
        )
        for v in OTHERS
    ]
    width = GEOMETRY.hidden
    return Scenario(
        name=f"route_grouped_linear ({width} to {3 * width}), B={batch}",
        truth=lambda: case.truth(case.eager_route()),
        base="dense",
        variants=(*ours, *others),
        flop=2.0 * batch * GEOMETRY.tokens * width * 3 * width,
        info={
            "bench": "route_grouped_linear",
            "geometry": GEOMETRY.name,
            "batch": batch,
            "route": "by score",
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize("batch", BATCHES)
def test_route_grouped_linear(record: Callable[..., None], batch: int, variant: str) -> None:
    record(scenario, batch, variant=variant)
