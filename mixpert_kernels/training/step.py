"""One step of a stage: forward, backward, and what all processes together found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_optimizer import AdapterOptimizer
from .batches import Batch, Reading, Skipped
from .data import Sample
from .loss import per_expert_mean
from .optimizer import ExpertOptimizer


@dataclass(frozen=True)
class StepReport:
    """What a step's global batch came to, the same in every process.

    Attributes:
        loss: the objective.
        by_domain: mean loss of each domain that has images in the batch.
        share: share of the batch's images by domain.
        images: how many could be read.
        skipped: those that could not.
        finite: whether every image's loss is.
    """

    loss: float
    by_domain: dict[str, float]
    share: dict[str, float]
    images: int
    skipped: list[Skipped]
    finite: bool


def run_step(
    model: nn.Module,
    runner: nn.Module,
    optimizer: ExpertOptimizer | AdapterOptimizer,
    batch: Batch,
    reading: Reading,
    dummy: Sample,
) -> StepReport:
    """Leave the gradient of the global batch, each expert's mean over its own images, in the parameters.

    Args:
        model: the head with its tower.
        runner: the model as the processes call it.
        optimizer: told not to count a dummy image.
        batch: this process's share of the step's images; it may have none.
        reading: how to read and compute.
        dummy: the sample whose targets go with an empty image where this process has none, for it to take part in
            what all processes do together.
    """
    tower = getattr(model, "tower", None)  # MoME has none: its routers choose
    experts = 1 if tower is None else tower.config.num_experts
    domain = reading.domains(batch.samples)
    route = domain if experts > 1 else torch.zeros_like(domain)
    with reading.autocast():
        losses, counts = _losses(model, runner, optimizer, batch, route, reading, dummy)
    per_expert_mean(losses, route, experts, counts=counts).backward()
    return _report(losses.detach(), counts, domain, batch.skipped, experts, reading)


def _losses(
    model: Any,
    runner: nn.Module,
    optimizer: ExpertOptimizer | AdapterOptimizer,
    batch: Batch,
    route: Tensor,
    reading: Reading,
    dummy: Sample,
) -> tuple[Tensor, Tensor]:
    device = reading.group.device

    def run(pixels: Any, samples: Sequence[Sample], expert: Tensor) -> tuple[Tensor, Tensor]:
        targets = {name: t.to(device) for name, t in model.targets(samples).items()}
        if isinstance(pixels, Tensor):  # encoders of several kinds move theirs themselves
            pixels = pixels.to(device, non_blocking=True)
        forced = {"expert": expert} if hasattr(model, "tower") else {}
        out = runner(pixels, **targets, **forced)
        return out.losses, out.counts

    if batch.samples:
        return run(batch.pixels, batch.samples, route)
    with optimizer.no_hits():
        losses, counts = run(reading.blank(), [dummy], torch.zeros(1, dtype=torch.int64))
    return losses[:0], counts[:0]


def _report(
    losses: Tensor,
    counts: Tensor,
    domain: Tensor,
    skipped: list[Skipped],
    experts: int,
    reading: Reading,
) -> StepReport:
    names, group = reading.experts, reading.group
    table = torch.zeros(4, len(names), dtype=torch.float64, device=losses.device)
    where = domain.to(losses.device)
    for row, values in enumerate((losses, counts, torch.ones_like(losses))):
        table[row].index_add_(0, where, values.double())
    table[3, 0] = len(skipped)
    table = group.sum(table).cpu()
    sums, tokens, images, missing = table
    present = images > 0
    means = sums / tokens.clamp_min(1)
    objective = means.sum() if experts > 1 else sums.sum() / tokens.sum().clamp_min(1)
    every = [s for some in group.gather(skipped) for s in some] if missing[0] else []
    return StepReport(
        loss=float(objective),
        by_domain={n: float(m) for n, m, there in zip(names, means, present, strict=True) if there},
        share={n: float(k / images.sum()) for n, k in zip(names, images, strict=True) if k},
        images=int(images.sum()),
        skipped=every,
        finite=bool(sums.isfinite().all()),
    )
