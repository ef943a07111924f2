"""The stages of training: which parameters each one trains."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mixpert_kernels.cli.tables import print_table

if TYPE_CHECKING:
    from mixpert_kernels.hf.tower import FusedMixpertTower

STAGES = ("alignment", "knowledge", "joint", "clone", "experts", "router")

# Parts of a model, and the stages that train them. ``model`` is what stands around the tower: an LLM, a head.
_TRAINED = {
    "trunk": ("knowledge", "joint"),
    "experts": ("knowledge", "joint", "experts"),
    "projector": ("alignment", "knowledge", "joint", "experts"),
    "router": ("router",),
    "model": ("knowledge", "joint"),
}
_OF_ONE_EXPERT = ("alignment", "knowledge", "joint")

_stages: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_guards: list = []  # the handle of the optimizers' hook, once there is one


class StageRow(NamedTuple):
    """What a stage trains of one part of the model.

    Attributes:
        part: ``trunk`` (with the shared final norm), ``experts`` (the expert layers), ``projector``, ``router``, or
            ``model``: what stands around the tower.
        trainable: how many parameters train.
        frozen: how many do not.
        bytes: memory of the part's parameters.
    """

    part: str
    trainable: int
    frozen: int
    bytes: int


def set_stage(model: nn.Module, stage: str, *, num_experts: int | None = None) -> list[StageRow]:
    """Have exactly the parameters of a stage train, and print how many they are.

    | stage | trains | runs on |
    |---|---|---|
    | alignment | the projector | one expert |
    | knowledge, joint | everything but the router | one expert |
    | clone | nothing: every expert becomes a copy of expert 0 | one expert, or E |
    | experts | expert layers and projector, under teacher routing | any |
    | router | the router | any |

    Frozen parameters lose their ``grad``. ``clone`` grows a tower of one expert in place: expert layers and projector
    get E copies, the router starts anew, ``config.num_experts`` follows and ``config.expert_names`` is dropped unless
    it has E names. Those parameters are new: an optimizer made before, DDP or FSDP around it has to be made again.

    In stage ``experts`` a stock optimizer that holds a parameter of several experts raises at ``step``: it would decay
    the weights of experts without images and move them by old momentum. ``ExpertOptimizer`` does not. A deep copy of
    a model has no stage; set it again.

    Args:
        model: a FusedMixpertTower, or a module with exactly one inside.
        stage: one of ``STAGES``.
        num_experts: E, for ``clone``; may be left out where the tower has E experts already.

    Returns:
        One row a part of the model, as printed (in a process group by the first process alone).

    Raises:
        ValueError: an unknown stage, no tower or two, a tower of several experts in a stage that comes before
            ``clone``, no projector to align, or a ``num_experts`` that does not fit.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> from mixpert_kernels import FusedMixpertTower
        >>> vision = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14))
        >>> tower = FusedMixpertTower.from_vision_model(vision, nn.Linear(32, 8), num_experts=1)
        >>> rows = set_stage(tower, "alignment")
        stage alignment  trainable  frozen   bytes
        trunk                    0   27520  110080
        experts                  0   17088   68352
        projector              264       0    1056
        router                   0      97     388
        >>> rows = set_stage(tower, "clone", num_experts=4)  # doctest: +ELLIPSIS
        stage clone...
        >>> tower.config.num_experts
        4
    """
    tower = find_tower(model)
    _check(tower, stage, num_experts)
    if stage == "clone":
        _clone(tower, num_experts or tower.config.num_experts)
    _stages[tower] = stage
    if stage == "experts" and not _guards:
        _guards.append(register_optimizer_step_pre_hook(_refuse_stock_optimizers))
    return train_parts(stage, _parts(model, tower), _TRAINED)


def stage_of(model: nn.Module) -> str | None:
    """Return the stage last set on a model; None where none was."""
    return _stages.get(find_tower(model))


def find_tower(model: nn.Module) -> FusedMixpertTower:
    """Return the one FusedMixpertTower that ``model`` is or holds.

    Raises:
        ValueError: there is none, or several.
    """
    from mixpert_kernels.hf.tower import FusedMixpertTower

    found = [module for module in model.modules() if isinstance(module, FusedMixpertTower)]
    if len(found) != 1:
        raise ValueError(
            f"find_tower: model must hold exactly one FusedMixpertTower, got {len(found)} in a "
            f"{type(model).__name__}"
        )
    return found[0]


def grouped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters (E, ...) of expert layers and projector by their names in ``model``."""
    tower = find_tower(model)
    grouped = {id(p) for part in ("experts", "projector") for p in _parameters(tower, part)}
    return {name: p for name, p in model.named_parameters() if id(p) in grouped}


def is_grouped(parameter: nn.Parameter) -> bool:
    """Whether a parameter is one of the experts' (E, ...), of any tower that is alive and has a stage."""
    return any(
        parameter is p for tower in list(_stages) for p in grouped_parameters(tower).values()
    )


def train_parts(
    stage: str, parts: Mapping[str, list[nn.Parameter]], trained: Mapping[str, tuple[str, ...]]
) -> list[StageRow]:
    """Have those parts train that a stage trains, freeze the others without their ``grad``, and print a table of them.

    Args:
        stage: its name.
        parts: the parameters of each part.
        trained: the stages that train each part.

    Returns:
        One row a part, as printed (in a process group by the first process alone).
    """
    rows = []
    for part, parameters in parts.items():
        trains = stage in trained[part]
        for parameter in parameters:
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in parameters)
        rows.append(StageRow(part, count * trains, count * (not trains), size))
    if not (dist.is_initialized() and dist.get_rank()):
        head = (f"stage {stage}", *StageRow._fields[1:])
        print_table([head, *(tuple(map(str, row)) for row in rows)])
    return rows


def _check(tower: FusedMixpertTower, stage: str, num_experts: int | None) -> None:
    experts = tower.config.num_experts
    if stage not in STAGES:
        raise ValueError(f"set_stage: stage must be one of {', '.join(STAGES)}, got {stage}")
    if stage in _OF_ONE_EXPERT and experts != 1:
        raise ValueError(
            f"set_stage: model must have one expert in stage {stage}, got {experts}: make the tower with num_experts=1"
        )
    if stage == "alignment" and tower.projector is None:
        raise ValueError("set_stage: model must have a projector in stage alignment, got none")
    if stage != "clone":
        if num_experts is not None:
            raise ValueError(
                f"set_stage: num_experts must be None in stage {stage}, got {num_experts}"
            )
        return
    whole = isinstance(num_experts, int) and not isinstance(num_experts, bool)
    if experts == 1 and not (whole and num_experts >= 1):
        raise ValueError(
            "set_stage: num_experts must be at least 1 to clone a tower of one expert, got "
            f"{num_experts}"
        )
    if experts > 1 and num_experts not in (None, experts):
        raise ValueError(
            f"set_stage: num_experts must be None or {experts}, the tower's, got {num_experts}"
        )
    if any(isinstance(p, DTensor) for p in tower.parameters()):
        raise ValueError("set_stage: model must be cloned before it is sharded, got DTensors")


@torch.no_grad()
def _clone(tower: FusedMixpertTower, num_experts: int) -> None:
    config = tower.config
    for block in (*tower.experts, tower.projector):
        if block is not None:
            block.reclone(num_experts)
    if num_experts == config.num_experts:
        return
    tower.router.resize(num_experts)
    config.num_experts = num_experts
    if config.expert_names is not None and len(config.expert_names) != num_experts:
        config.expert_names = None
    config.check()


def _parts(model: nn.Module, tower: FusedMixpertTower) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model once, by part; a part without any is left out."""
    parts = {part: _parameters(tower, part) for part in ("trunk", "experts", "projector", "router")}
    inside = {id(p) for p in tower.parameters()}
    parts["model"] = [p for p in model.parameters() if id(p) not in inside]
    return {part: parameters for part, parameters in parts.items() if parameters}


def _parameters(tower: FusedMixpertTower, part: str) -> list[nn.Parameter]:
    module = getattr(tower, part)
    return [] if module is None else list(module.parameters())


def _refuse_stock_optimizers(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before any optimizer's step: raise where it would move experts that had no images."""
    if getattr(optimizer, "steps_experts_apart", False):
        return
    grouped = {
        id(parameter): name
        for tower, stage in list(_stages.items())
        if stage == "experts" and tower.config.num_experts > 1
        for name, parameter in grouped_parameters(tower).items()
    }
    held = [grouped[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in grouped]
    if held:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step: in stage experts the optimizer must be an ExpertOptimizer, got one that "
            f"holds {held[0]} of all experts: it would also move experts that had no images"
        )
