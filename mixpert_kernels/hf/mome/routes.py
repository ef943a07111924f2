"""What the routers make of instructions, without images, the LLM or the encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixpert_kernels.modules.mole import InstructionRouter
from mixpert_kernels.modules.move import MixtureOfVisionExperts, VisionBranch

from .model import Instructions, MomeForConditionalGeneration
from .saving import fill, read_config, read_tensors
from .sentence import Embed, SentenceEncoder, embed


class Routes(NamedTuple):
    """Where B instructions lead.

    Attributes:
        branches: names of the n vision experts.
        weights: (B, n) float32, how much of each vision expert is seen.
        experts: (B, layers), the adapter of each layer of the LLM; (B, 0) where no layer has several.
        scores: (B, layers, K) float32, the adapters' probabilities.
    """

    branches: list[str]
    weights: Tensor
    experts: Tensor
    scores: Tensor


@torch.no_grad()
def route(
    model: MomeForConditionalGeneration | Path | str,
    instructions: Instructions,
    *,
    sentence_encoder: Embed | Path | str | None = None,
) -> Routes:
    """Ask the routers of a model, or of a saved one, of which only routers and sentence encoder are read.

    Args:
        model: in memory, or the directory of one that ``save`` wrote.
        instructions: B texts, or their embeddings (B, S).
        sentence_encoder: in the place of the model's.

    Returns:
        The weights and adapters, on the CPU.

    Raises:
        ValueError: the directory holds no such model, or the instructions cannot be embedded.
    """
    if isinstance(model, MomeForConditionalGeneration):
        own, width = model.sentence_encoder, model.move.sentence_width
        move = model.move
        routers = [layer.router for layer in model.layers if layer.router is not None]
        device = model.device
    else:
        directory, config = read_config("route", model)
        own, width = config["sentence_encoder"], config["sentence_width"]
        own = own and directory / own
        move, routers = _load_routers(directory, config)
        device = torch.device("cpu")
    chosen = own if sentence_encoder is None else sentence_encoder
    if isinstance(chosen, str | Path) and not isinstance(instructions, Tensor):
        chosen = SentenceEncoder(chosen)
    embedding = embed("route", chosen, instructions, width).to(device)
    none = embedding.new_zeros(len(embedding), 0, 1, dtype=torch.float32)
    each = [router(embedding).softmax(1) for router in routers]
    scores = torch.stack(each, 1) if each else none
    weights = move.weights(embedding)
    return Routes(list(move.branches), weights.cpu(), scores.argmax(-1).cpu(), scores.cpu())


def _load_routers(
    directory: Path, config: dict[str, Any]
) -> tuple[MixtureOfVisionExperts, list[InstructionRouter]]:
    state = read_tensors("route", directory, lambda name: ".router." in name)
    width = config["sentence_width"]
    blind = {
        name: VisionBranch(nn.Identity(), 1, 1, transform="none") for name in config["branches"]
    }
    move = MixtureOfVisionExperts(blind, 1, width, config["mix"])
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, rest = name.partition(".router.")
        groups.setdefault(owner, {})[rest] = tensor
    own = groups.pop("move", {})
    if move.router is not None:
        fill("route", directory, dict(move.router.named_parameters()), own)
    routers = []
    for owner in sorted(groups, key=_layer):
        routers.append(InstructionRouter(width, config["experts"]))
        fill("route", directory, dict(routers[-1].named_parameters()), groups[owner])
    return move, routers


def _layer(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
