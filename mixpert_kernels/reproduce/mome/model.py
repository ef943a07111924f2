"""The arms: MoME models around the same frozen encoders and language model, made by ``mome.build``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mixpert_kernels.hf import mome
from mixpert_kernels.hf.mome import MomeForConditionalGeneration

from .encoders import ENCODERS
from .sentences import WIDTH, embed
from .settings import Settings


class Arm(NamedTuple):
    """What is special about a model.

    Attributes:
        encoders: its vision experts.
        transform: of those whose patches are not on the grid of visual tokens.
        mix: of ``mome.build``.
        experts: K.
        times: hidden width of an adapter over ``Settings.adapter``.
    """

    encoders: tuple[str, ...] = ENCODERS
    transform: str = "deformable"
    mix: str = "router"
    experts: int = 1
    times: int = 1


FIRST = {  # stage 1: from new weights
    "clip": Arm(encoders=("clip",), mix="addition"),
    "pool+addition": Arm(transform="pool", mix="addition"),
    "adt+addition": Arm(mix="addition"),
    "adt+router": Arm(),
}
BASE = "adt+router"  # of stage 2


def second(settings: Settings) -> dict[str, Arm]:
    """The arms of stage 2, from ``BASE``: one adapter as it is, K copies of it, or one of K times its hidden width."""
    k = settings.experts
    return {"one": Arm(), "mole": Arm(experts=k), "wide": Arm(times=k)}


def new_model(
    arm: Arm, encoders: dict[str, Any], llm: Any, settings: Settings, seed: int
) -> MomeForConditionalGeneration:
    """A model of an arm, what is trained always the same for a seed and arm.

    Args:
        arm: which.
        encoders: transformers models, by name.
        llm: a transformers decoder, changed in place.
        settings: sizes.
        seed: of the weights.
    """
    torch.manual_seed(20_000 + seed)
    grid = {"transform": "none", "norm": True, "cls": True}
    other = {"transform": arm.transform, "norm": False, "cls": False}
    model = mome.build(
        llm,
        {name: encoders[name] for name in arm.encoders},
        sentence_encoder=embed,
        sentence_width=WIDTH,
        experts=arm.experts,
        hidden=arm.times * settings.adapter,
        mix=arm.mix,
        size=settings.size,
        options={
            "layers": settings.adt_layers,
            "heads": settings.heads,
            "points": settings.points,
            "ffn": settings.adt_ffn,
            "dropout": 0.0,
        },
        branches={name: grid if name == "clip" else other for name in arm.encoders},
    )
    model.freeze()
    return model


def learnt(model: MomeForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All parameters but the encoders'."""
    return {name: p.detach() for name, p in model.named_parameters() if ".encoder." not in name}


def grow(model: MomeForConditionalGeneration, state: dict[str, torch.Tensor]) -> None:
    """Load what an arm of one adapter learnt into a model of one, several or a wider adapter; the function stays.

    Args:
        model: of the same branches, as ``new_model`` made it.
        state: what ``learnt`` gives for the other.
    """
    with torch.no_grad():
        for name, parameter in learnt(model).items():
            if name not in state:  # the new routers of MoLE
                continue
            old = state[name]
            if parameter.shape[1:] == old.shape[1:]:
                parameter.copy_(old.expand_as(parameter))  # a copy for each expert
            elif name.endswith(".up"):
                parameter[..., : old.shape[2]] = old  # and 0 for the new hidden units, as made
            else:  # down and down_bias keep their new rows, which up does not read yet
                parameter[:, : old.shape[1]] = old
