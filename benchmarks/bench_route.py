"""route (pool, score, decide, sort) against the same in eager PyTorch, and that compiled."""

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
STRATEGY = ops.Strategy("score_difference", delta=0.1)
EPS = 1e-5
OURS = (*(f"ours_{backend}" for backend in BACKENDS), "ours_captured")
OTHERS = ("eager", "eager_captured", "compiled_eager")
Decision = tuple[Tensor, Tensor, Tensor, Tensor]  # expert, order, offsets, scores


def eager(x: Tensor, w: ops.RouterWeights) -> Decision:
    """All of route for ``score_difference`` against the runner-up, in the fewest calls."""
    z = F.layer_norm(x.mean(1, dtype=torch.float32), x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    scores = F.linear(z, w.weight, w.bias).softmax(-1)
    (top, runner_up), best = scores.topk(2).values.unbind(-1), scores.argmax(-1)
    sure = (top - runner_up >= STRATEGY.delta) & scores.isfinite().all(-1)
    ids, order = torch.where(sure, best, 0).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(NUM_EXPERTS + 1, device=x.device))
    return torch.where(sure, best, 0), order, offsets, scores


def case(batch: int) -> tuple[Tensor, ops.RouterWeights]:
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) + mean).to(DEVICE)

    width = GEOMETRY.hidden
    x = random(batch, GEOMETRY.tokens, width) + random(batch, 1, width)  # images that differ
    weight, bias = random(NUM_EXPERTS, width) / width**0.5, random(NUM_EXPERTS)
    gain, offset = random(width, mean=1.0), random(width)
    return x.to(DTYPE), ops.RouterWeights(gain, offset, None, None, weight, bias)


def scenario(batch: int) -> Scenario:
    x, weights = case(batch)

    def ours(backend: str) -> Callable[[], Decision]:
        reason = why_not("route", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        return lambda: ops.route(x, weights, STRATEGY, eps=EPS, backend=backend)[:4]

    return Scenario(
        name=f"route ({GEOMETRY.hidden}), B={batch}",
        truth=lambda: eager(x, weights),
        base="eager",
        variants=(
            *(Variant(f"ours_{b}", functools.partial(ours, b)) for b in BACKENDS),
            Variant("ours_captured", lambda: baselines.captured(ours("triton"))),
            Variant("eager", lambda: lambda: eager(x, weights)),
            Variant("eager_captured", lambda: baselines.captured(lambda: eager(x, weights))),
            Variant(
                "compiled_eager",
                lambda: functools.partial(baselines.compiled(eager, x, weights), x, weights),
            ),
        ),
        moved=float(x.numel() * x.element_size()),
        info={"bench": "route", "geometry": GEOMETRY.name, "batch": batch, "route": "by score"},
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize("batch", BATCHES)
def test_route(record: Callable[..., None], batch: int, variant: str) -> None:
    record(scenario, batch, variant=variant)
