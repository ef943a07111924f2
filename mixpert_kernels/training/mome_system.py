"""MoME as a recipe trains it: stages, metrics of its routers, evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .adapter_optimizer import AdapterOptimizer
from .batches import Reading
from .data import ImageSet, Sample, domains_of
from .evaluation import batches_once, mean_over_domains, print_evaluation
from .mome_stages import frozen_names, language_experts, set_mome_stage
from .prepare import make_optimizer
from .recipe import Recipe, Stage
from .system import Skip


class MomeSystem:
    """A mixture of vision experts and of language experts, which instructions choose.

    Args:
        recipe: with ``model.mome``.
        train: the data; its domains are the tasks.
    """

    def __init__(self, recipe: Recipe, train: ImageSet) -> None:
        assert recipe.model.mome is not None  # so it was chosen
        self.recipe, self.settings = recipe, recipe.model.mome
        self.names = domains_of(train)

    def build(self, labels: list[str]) -> tuple[nn.Module, Any]:
        from mixpert_kernels.hf.mome.learner import build_learner

        return build_learner(self.recipe.model)

    def experts(self, model: nn.Module) -> int:
        return next(iter(language_experts(model).values())).experts

    def clone(self, model: nn.Module) -> None:
        set_mome_stage(model, "clone", num_experts=self.settings.experts)

    def set_stage(self, model: nn.Module, stage: Stage) -> None:
        set_mome_stage(model, stage.name)

    def optimizer(self, model: nn.Module, stage: Stage) -> AdapterOptimizer:
        make = partial(make_optimizer, stage)
        return AdapterOptimizer(model, make, max_norm=stage.max_norm or None, schedule=stage.factor)

    def row(
        self,
        model: nn.Module,
        stage: Stage,
        optimizer: Any,
        samples: list[Sample],
        reading: Reading,
    ) -> dict[str, Any]:
        mixing = Mixing(model, reading)
        mixing.add(samples)
        rates = {name: rate for name, rate in optimizer.last_rates.items() if name == "shared"}
        return {"lr": rates, **mixing.summary()}

    def frozen(self, model: nn.Module) -> set[str]:
        return frozen_names(model)

    def describe(self) -> dict[str, Any]:
        return {"tasks": self.names, "branches": list(self.settings.encoders)}

    def save(self, model: Any) -> list[str]:
        model.save(self.recipe.output / "model")
        return ["model"]

    @torch.no_grad()
    def evaluate(
        self, model: Any, images: ImageSet, reading: Reading, skip: Skip
    ) -> dict[str, Any]:
        """Teacher-forced: the share of answers of which every token is right, and the loss a token, by task."""
        mixing = Mixing(model, reading)
        sums = torch.zeros(4, len(self.names), dtype=torch.float64)  # images, right, loss, tokens
        for batch in batches_once(images, reading, skip, "evaluation"):
            device = reading.group.device
            targets = {k: v.to(device) for k, v in model.targets(batch.samples).items()}
            with reading.autocast():
                out = model(batch.pixels, **targets)
            where = reading.domains(batch.samples)
            columns = (torch.ones_like(out.losses), out.correct, out.losses, out.counts)
            for row, values in zip(sums, columns, strict=True):
                row.index_add_(0, where, values.double().cpu())
            mixing.add(batch.samples)
        sums = torch.stack(reading.group.gather(sums)).sum(0)
        table = {
            name: {
                "images": int(count),
                "right": float(right / count),
                "loss": float(loss / tokens),
            }
            for name, (count, right, loss, tokens) in zip(self.names, sums.T, strict=True)
            if count
        }
        shares = {name: {k: row[k] for k in ("images", "right")} for name, row in table.items()}
        print_evaluation(shares)
        return {"domains": table, "mean": mean_over_domains(table), **mixing.summary()}


class Mixing:
    """What the routers, as they are now, make of samples' instructions."""

    def __init__(self, model: Any, reading: Reading) -> None:
        self.model, self.reading = model, reading
        mome = model.model
        layers = len(mome.layers) if mome.experts > 1 else 0
        self.weights = torch.zeros(
            len(reading.experts), 1 + len(mome.branches), dtype=torch.float64
        )
        self.chosen = torch.zeros(layers, mome.experts, dtype=torch.float64)

    @torch.no_grad()
    def add(self, samples: list[Sample]) -> None:
        """Count samples; there may be none."""
        if not samples:
            return
        from mixpert_kernels.hf.mome import route

        routes = route(self.model.model, self.model.embed(samples))
        ones = torch.ones(len(samples), 1)
        rows = torch.cat([ones, routes.weights], 1).double()  # (I, 1 + n)
        self.weights.index_add_(0, self.reading.domains(samples), rows)
        for layer, expert in enumerate(routes.experts.T):  # (I,)
            self.chosen[layer] += expert.bincount(minlength=self.chosen.shape[1])

    def summary(self) -> dict[str, Any]:
        """``weights``: by task, the mean weight of each branch; ``experts``: by layer, each one's share of the samples.

        Of all processes, each of which has to call this. ``experts`` is left out where there is one alone.
        """
        gather = self.reading.group.gather
        weights, chosen = (torch.stack(gather(part)).sum(0) for part in (self.weights, self.chosen))
        branches = self.model.model.branches
        found: dict[str, Any] = {
            "weights": {
                name: dict(zip(branches, (row[1:] / row[0]).tolist(), strict=True))
                for name, row in zip(self.reading.experts, weights, strict=True)
                if row[0]
            }
        }
        if len(chosen):
            found["experts"] = {
                f"layer_{i}": {f"expert_{k}": float(n / row.sum()) for k, n in enumerate(row)}
                for i, row in enumerate(chosen)
                if row.sum()
            }
        return found
