"""norm_grouped_linear (LayerNorm and QKV, LayerNorm and fc1) against its two ops, and against eager PyTorch."""

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
EPS = 1e-6
DENSE_EXPERT = 1
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("dense", "two_ops", "naive_loop")
LAYERS = {"qkv": (3 * GEOMETRY.hidden, "none"), "fc1": (GEOMETRY.intermediate, "gelu_tanh")}
CASES = {
    "ci": [("qkv", 4, "balanced")],
    "default": [(name, batch, "balanced") for name in LAYERS for batch in (1, 8)],
    "full": [(name, batch, "balanced") for name in LAYERS for batch in (1, 2, 8, 32)],
}[SIZE]


class Case:
    """The tensors of one scenario, and each variant as a method that builds its call."""

    def __init__(self, layer: str, batch: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(batch)
        depth = GEOMETRY.hidden
        self.width, self.activation = LAYERS[layer]

        def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std + mean).to(DEVICE, DTYPE)

        self.x = random(batch, GEOMETRY.tokens, depth)
        self.gain = random(NUM_EXPERTS, depth, mean=1.0)
        self.offset = random(NUM_EXPERTS, depth)
        self.weight = random(NUM_EXPERTS, self.width, depth, std=0.03)
        self.bias = random(NUM_EXPERTS, self.width, std=0.03)
        self.expert = route_of(kind, batch)
        self.routing = Routing.forced(self.expert, NUM_EXPERTS)

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [functools.partial(self.expert_on, e) for e in range(NUM_EXPERTS)]

    def expert_on(self, e: int, x: Tensor) -> Tensor:
        gain, offset, weight, bias = (
            t[e].to(x.dtype) for t in (self.gain, self.offset, self.weight, self.bias)
        )
        z = F.linear(F.layer_norm(x, x.shape[-1:], gain, offset, EPS), weight, bias)
        return z if self.activation == "none" else F.gelu(z, approximate="tanh")

    def truth(self, expert: Tensor) -> Tensor:
        return baselines.per_group(self.experts, expert, self.x.float())

    def ours(self, backend: str) -> Callable[[], Tensor]:
        reason = why_not("norm_grouped_linear", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        given = (self.x, self.gain, self.offset, self.weight, self.bias, self.routing)
        options = {"norm_eps": EPS, "activation": self.activation, "backend": backend}
        return lambda: ops.norm_grouped_linear(*given, **options)

    def two_ops(self) -> Callable[[], Tensor]:
        def call() -> Tensor:
            h = ops.grouped_layer_norm(self.x, self.gain, self.offset, self.routing, eps=EPS)
            options = {"activation": self.activation}
            return ops.grouped_linear(h, self.weight, self.bias, self.routing, **options)

        return call

    def dense(self) -> Callable[[], Tensor]:
        return lambda: self.expert_on(DENSE_EXPERT, self.x)

    def naive_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.per_group(self.experts, self.expert, self.x)


def scenario(layer: str, batch: int, kind: str) -> Scenario:
    case = Case(layer, batch, kind)
    single = torch.full_like(case.expert, DENSE_EXPERT)
    ours = [Variant(f"ours_{b}", functools.partial(case.ours, b)) for b in BACKENDS]
    others = [
        Variant(
            v, getattr(case, v), functools.partial(case.truth, single) if v == "dense" else None
        )
        for v in OTHERS
    ]
    depth = GEOMETRY.hidden
    return Scenario(
        name=f"norm_grouped_linear {layer} ({depth} to {case.width}), B={batch}, {kind}",
        truth=functools.partial(case.truth, case.expert),
        base="dense",
        variants=(*ours, *others),
        flop=2.0 * batch * GEOMETRY.tokens * depth * case.width,
        info={
            "bench": "norm_grouped_linear",
            "geometry": f"{GEOMETRY.name} {layer}",
            "batch": batch,
            "route": kind,
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize(("layer", "batch", "kind"), CASES)
def test_norm_grouped_linear(
    record: Callable[..., None], layer: str, batch: int, kind: str, variant: str
) -> None:
    record(scenario, layer, batch, kind, variant=variant)
