"""What a recipe trains: a tower with a head on it, or a MoME model. The run loop asks it for all that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import nn

from .batches import Reading, Skipped
from .data import ImageSet, Sample
from .evaluation import evaluate, mean_over_domains, print_evaluation
from .optimizer import ExpertOptimizer
from .output import save_model, write_routes
from .prepare import make_optimizer
from .recipe import Recipe, Stage
from .stages import find_tower, set_stage

Skip = Callable[[Sequence[Skipped]], None]


class System(Protocol):
    """One of the systems.

    Attributes:
        names: of the data's domains: the experts', or the tasks'.
    """

    names: list[str]

    def build(self, labels: list[str]) -> tuple[nn.Module, Any]:
        """Build the model, of one expert, and what turns images into its inputs."""

    def experts(self, model: nn.Module) -> int:
        """How many experts it has now."""

    def clone(self, model: nn.Module) -> None:
        """Make as many experts of the one as the recipe says."""

    def set_stage(self, model: nn.Module, stage: Stage) -> None:
        """Have the parameters of a stage train, and no other."""

    def optimizer(self, model: nn.Module, stage: Stage) -> Any:
        """Make the stage's optimizer."""

    def row(
        self,
        model: nn.Module,
        stage: Stage,
        optimizer: Any,
        samples: list[Sample],
        reading: Reading,
    ) -> dict[str, Any]:
        """What a row of metrics has of its own, after a step. Every process calls this."""

    def frozen(self, model: nn.Module) -> set[str]:
        """The tensors that no stage changes, which a checkpoint leaves out."""

    def describe(self) -> dict[str, Any]:
        """What names the results."""

    def save(self, model: nn.Module) -> list[str]:
        """Save what was trained, for inference; returns the directories' names."""

    def evaluate(
        self, model: nn.Module, images: ImageSet, reading: Reading, skip: Skip
    ) -> dict[str, Any]:
        """Evaluate on test data, and print it. Every process calls this."""


class TowerSystem:
    """Mixpert: a tower whose images a teacher routes while its experts train."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.names = list(recipe.data.experts or ())

    def build(self, labels: list[str]) -> tuple[nn.Module, Any]:
        from mixpert_kernels.hf.heads import build

        model, preprocess = build(self.recipe.model, labels)
        find_tower(model).config.expert_names = self.names[:1]
        return model, preprocess

    def experts(self, model: nn.Module) -> int:
        return find_tower(model).config.num_experts

    def clone(self, model: nn.Module) -> None:
        set_stage(model, "clone", num_experts=len(self.names))
        find_tower(model).config.expert_names = list(self.names)

    def set_stage(self, model: nn.Module, stage: Stage) -> None:
        set_stage(model, stage.name)

    def optimizer(self, model: nn.Module, stage: Stage) -> ExpertOptimizer:
        make = partial(make_optimizer, stage)
        return ExpertOptimizer(model, make, max_norm=stage.max_norm or None, schedule=stage.factor)

    def row(
        self,
        model: nn.Module,
        stage: Stage,
        optimizer: Any,
        samples: list[Sample],
        reading: Reading,
    ) -> dict[str, Any]:
        rates = {
            name: stage.lr * stage.factor(steps - 1)
            for name, steps in zip(self.names, optimizer.steps, strict=False)
            if steps
        }
        return {"lr": rates}

    def frozen(self, model: nn.Module) -> set[str]:
        return set()

    def describe(self) -> dict[str, Any]:
        return {"experts": self.names}

    def save(self, model: Any) -> list[str]:
        save_model(model, self.recipe)
        return ["tower", "head"]

    def evaluate(
        self, model: Any, images: ImageSet, reading: Reading, skip: Skip
    ) -> dict[str, Any]:
        routed = any(stage.name == "router" for stage in self.recipe.stages)
        table, routes = evaluate(model, images, reading, skip, routed=routed)
        results: dict[str, Any] = {"domains": table, "mean": mean_over_domains(table)}
        print_evaluation(table)
        if routes:
            results["routes"] = routes
            if reading.group.first:
                write_routes(self.recipe.output, routes)
        return results


def system_of(recipe: Recipe, train: ImageSet) -> System:
    """The system that a recipe trains."""
    if recipe.model.mome is None:
        return TowerSystem(recipe)
    from .mome_system import MomeSystem

    return MomeSystem(recipe, train)
