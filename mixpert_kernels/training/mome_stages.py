"""MoME's stages: which parameters each one trains, and one adapter becoming several."""

from __future__ import annotations

from torch import nn

from mixpert_kernels.modules.mole import ADAPTER, MixtureOfLanguageExperts
from mixpert_kernels.modules.move import MixtureOfVisionExperts, VisionBranch

from .stages import StageRow, train_parts

MOME_STAGES = ("move", "clone", "mole")
_TRAINED = {
    "encoders": (),
    "vision": ("move", "mole"),
    "adapters": ("move", "mole"),
    "routers": ("mole",),
    "language": (),
}


def set_mome_stage(
    model: nn.Module, stage: str, *, num_experts: int | None = None
) -> list[StageRow]:
    """Have exactly the parameters of a stage train, and print how many they are.

    | stage | trains | adapters beside each FFN |
    |---|---|---|
    | move | the vision mixture but its encoders, and the adapter | one |
    | clone | nothing: the adapter becomes K copies, with a new router a layer | one, or K |
    | mole | the same as ``move``, and the layers' routers | K |

    Encoders and language model are frozen in all of them. After ``clone`` the model gives bitwise what it gave before;
    an optimizer made before, or DDP around the model, has to be made again.

    Args:
        model: a module that holds a MixtureOfVisionExperts and MixtureOfLanguageExperts layers.
        stage: one of ``MOME_STAGES``.
        num_experts: K, for ``clone``.

    Returns:
        One row a part of the model, as printed (in a process group by the first process alone).

    Raises:
        ValueError: an unknown stage, a model without one of the mixtures, a number of adapters that does not fit the
            stage, or a ``num_experts`` that does not.
    """
    if stage not in MOME_STAGES:
        raise ValueError(
            f"set_mome_stage: stage must be one of {', '.join(MOME_STAGES)}, got {stage}"
        )
    layers = list(language_experts(model).values())
    _check(layers, stage, num_experts)
    if stage == "clone":
        for layer in layers:
            layer.reclone(num_experts)
    return train_parts(stage, _parts(model), _TRAINED)


def vision_mixture(model: nn.Module) -> MixtureOfVisionExperts:
    """The one MixtureOfVisionExperts that ``model`` is or holds; ValueError if there is none, or several."""
    found = [m for m in model.modules() if isinstance(m, MixtureOfVisionExperts)]
    if len(found) != 1:
        raise ValueError(
            f"vision_mixture: model must hold exactly one MixtureOfVisionExperts, got {len(found)} in a "
            f"{type(model).__name__}"
        )
    return found[0]


def language_experts(model: nn.Module) -> dict[str, MixtureOfLanguageExperts]:
    """The MixtureOfLanguageExperts of each layer, by name; ValueError if there is none, or they differ in number."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, MixtureOfLanguageExperts)}
    counts = {layer.experts for layer in found.values()}
    if len(counts) != 1:
        raise ValueError(
            "language_experts: model must hold MixtureOfLanguageExperts layers of one number of experts, got "
            f"{sorted(counts) or 'none'} in a {type(model).__name__}"
        )
    return found


def adapter_parameters(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Each layer's parameters (K, ...) of all its adapters, by their names in ``model``."""
    return [
        {f"{name}.{of}".removeprefix("."): getattr(layer, of) for of in ADAPTER}
        for name, layer in language_experts(model).items()
    ]


def frozen_names(model: nn.Module) -> set[str]:
    """The names of all tensors of the encoders and of the language model, which no stage changes."""
    parts = _parts(model)
    trained = {id(p) for part, of in parts.items() if _TRAINED[part] for p in of}
    return {n for n, t in model.state_dict(keep_vars=True).items() if id(t) not in trained}


def _check(layers: list[MixtureOfLanguageExperts], stage: str, num_experts: int | None) -> None:
    experts = layers[0].experts
    if stage == "move" and experts != 1:
        raise ValueError(
            f"set_mome_stage: model must have one adapter a layer in stage move, got {experts}"
        )
    if stage != "clone":
        if num_experts is not None:
            raise ValueError(
                f"set_mome_stage: num_experts must be None in stage {stage}, got {num_experts}"
            )
        return
    whole = isinstance(num_experts, int) and not isinstance(num_experts, bool)
    if not (whole and num_experts >= 2):
        raise ValueError(f"set_mome_stage: num_experts must be at least 2, got {num_experts}")


def _parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model once, by part."""
    branches = [m for m in model.modules() if isinstance(m, VisionBranch)]
    layers = language_experts(model).values()
    parts = {
        "encoders": [p for branch in branches for p in branch.encoder.parameters()],
        "adapters": [getattr(layer, name) for layer in layers for name in ADAPTER],
        "routers": [p for x in layers if x.router is not None for p in x.router.parameters()],
    }
    inside = {id(p) for of in parts.values() for p in of}
    parts["vision"] = [p for p in vision_mixture(model).parameters() if id(p) not in inside]
    inside |= {id(p) for p in parts["vision"]}
    parts["language"] = [p for p in model.parameters() if id(p) not in inside]
    return {part: parts[part] for part in _TRAINED}
