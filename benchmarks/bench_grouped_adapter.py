"""grouped_adapter, the op alone: a prompt, one token, and a training step with the router's gradient.

Against all four adapters and their one-hot sum, as MoME's own code computes them (`dense_4`, ratio 1), and against a
loop over masks that gathers each adapter's samples (`mask_gather`), which has no gradient for the router. `ops` is how
many calls of ops compute something, launches on a GPU where an op is one; `gflop` what a variant computes. Compared are
the output or, in training, the gradients of the features and the probabilities. bench_mole.py has it beside an FFN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _adt_baselines import Launches
from _harness import DEVICE, DTYPE, SIZE, Output, Scenario, Unavailable, Variant
from torch import Tensor

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS, why_not

EXPERTS, BATCH = 4, 4


class Geometry(NamedTuple):
    name: str
    width: int
    hidden: int
    tokens: int  # of a prompt with its image


GEOMETRY = {
    "ci": Geometry("tiny", 64, 16, 12),
    "default": Geometry("LLM of width 1024", 1024, 64, 600),
    "full": Geometry("Llama-7B", 4096, 64, 600),
}[SIZE]
CASES = ("prefill", "token", "training")
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("dense_4", "mask_gather")


class Case:
    """The tensors of one scenario, and each variant as a function of them."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(DEVICE, DTYPE)

        width, hidden, self.train = GEOMETRY.width, GEOMETRY.hidden, kind == "training"
        self.tokens = 1 if kind == "token" else GEOMETRY.tokens
        self.x = random(BATCH, self.tokens, width)
        self.residual, self.dy = random(*self.x.shape), random(*self.x.shape)
        self.params = (
            random(EXPERTS, hidden, width, std=width**-0.5),
            random(EXPERTS, hidden),
            random(EXPERTS, width, hidden, std=hidden**-0.5),
            random(EXPERTS, width),
            random(EXPERTS),
        )
        self.probabilities = torch.randn(BATCH, EXPERTS, generator=generator).softmax(1).to(DEVICE)
        self.expert = self.probabilities.argmax(1)
        self.routing = Routing.forced(self.expert, EXPERTS)

    def adapter(self, k: int, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        down, down_bias, up, up_bias, scale = (p[k] for p in params)
        return F.linear(F.linear(x, down, down_bias).relu(), up, up_bias) * scale

    def ours(self, backend: str, x: Tensor, params: tuple[Tensor, ...], p: Tensor) -> Tensor:
        return ops.grouped_adapter(
            x, *params, self.routing, residual=self.residual, probabilities=p, backend=backend
        )

    def dense_4(self, x: Tensor, params: tuple[Tensor, ...], p: Tensor) -> Tensor:
        gates = (F.one_hot(self.expert, EXPERTS) - p.detach() + p).to(x.dtype)
        outputs = (gates[:, k, None, None] * self.adapter(k, x, params) for k in range(EXPERTS))
        return self.residual.to(x.dtype) + sum(outputs)

    def mask_gather(self, x: Tensor, params: tuple[Tensor, ...], p: Tensor) -> Tensor:
        y = self.residual.to(x.dtype)
        for k in range(EXPERTS):
            rows = (self.expert == k).nonzero().squeeze(1)  # the host waits here
            if len(rows):
                y = y.index_add(0, rows, self.adapter(k, x[rows], params))
        return y

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype = DTYPE) -> Output:
        x, *params = (t.to(dtype) for t in (self.x, *self.params))
        if not self.train:
            return function(x, tuple(params), self.probabilities)
        with torch.enable_grad():
            x, *params = (t.detach().requires_grad_() for t in (x, *params))
            p = self.probabilities.detach().requires_grad_()
            y = function(x, tuple(params), p)
            grads = torch.autograd.grad(y, (x, p, *params), self.dy.to(dtype), allow_unused=True)
        return grads[0] if grads[1] is None else grads[:2]

    def gflop(self, computed: int) -> float:
        """Of so many adapters a token: two products of H x D forward, four more backward.

        The gradients of the weights, of the hidden numbers and of the features are one each. Ours takes two of H x D
        more for every other adapter's share in the router's gradient, where dense needs all six.
        """
        one = 2 * BATCH * self.tokens * GEOMETRY.width * GEOMETRY.hidden / 1e9
        if not self.train:
            return 2 * computed * one
        return (6 * computed + (2 * (EXPERTS - 1) if computed == 1 else 0)) * one


@functools.lru_cache(maxsize=1)
def setup(kind: str) -> Case:
    return Case(kind)


def scenario(kind: str) -> Scenario:
    case = setup(kind)
    wide = torch.float64 if DEVICE.type == "cpu" else torch.float32

    def variant(name: str) -> Variant:
        backend = name.removeprefix("ours_") if name in OURS else None
        function = getattr(case, name) if backend is None else functools.partial(case.ours, backend)

        def build() -> Callable[[], Output]:
            if backend is not None:
                reason = why_not("grouped_adapter", backend, device=DEVICE, dtype=DTYPE)
                if reason is not None:
                    raise Unavailable(reason)
            return lambda: case.run(function)

        plain = case.mask_gather if name == "mask_gather" else case.dense_4
        info = {"gflop": case.gflop(EXPERTS if name == "dense_4" else 1)}
        if name == "mask_gather" and case.train:
            info = {
                "gflop": 6 * case.gflop(1) / (6 + 2 * (EXPERTS - 1))
            }  # no gradient for the router
        if (
            backend is None
            or why_not("grouped_adapter", backend, device=DEVICE, dtype=DTYPE) is None
        ):
            with Launches() as launches:
                case.run(function)
            info["ops"] = launches.count
        return Variant(name, build, functools.partial(case.run, plain, wide), info)

    return Scenario(
        name=f"grouped_adapter {GEOMETRY.name}, {kind}, B={BATCH}, T={case.tokens}",
        truth=functools.partial(case.run, case.dense_4, wide),
        base="dense_4",
        variants=tuple(variant(name) for name in (*OURS, *OTHERS)),
        flop=case.gflop(1) * 1e9,
        info={
            "bench": "grouped_adapter",
            "geometry": GEOMETRY.name,
            "batch": BATCH,
            "route": "mixed",
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize("kind", CASES)
def test_grouped_adapter(record: Callable[..., None], kind: str, variant: str) -> None:
    record(scenario, kind, variant=variant)
