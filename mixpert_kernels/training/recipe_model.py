"""``[model]`` of a recipe: a vision tower with a head on it, or MoME."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._settings import one_of, require

HEADS = ("classifier",)
MIXES = ("router", "addition")
TRANSFORMS = ("deformable", "standard", "pool", "none")


@dataclass(frozen=True)
class Siglip:
    """Sizes of a SigLIP vision model with random weights."""

    hidden: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    intermediate: int | None = None  # default: 4 hidden

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value is None or value >= 1, f"model.siglip.{name}", "be at least 1", value)


@dataclass(frozen=True)
class Branch:
    """A branch of MoME's vision mixture; see ``mome.build``, whose defaults are meant by None.

    Attributes:
        transform: ``deformable``, or ``standard`` (cross-attention) or ``pool`` (average pooling), the ablations; or
            ``none``.
        norm: whether a LayerNorm comes before the projection.
        cls: whether its token of the whole image comes before the others.
        layers, heads, points, ffn, dropout: of the transform.
    """

    transform: str | None = None
    norm: bool | None = None
    cls: bool | None = None
    layers: int | None = None
    heads: int | None = None
    points: int | None = None
    ffn: int | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.transform is not None:
            one_of("model.mome: transform", self.transform, TRANSFORMS)

    @property
    def given(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Mome:
    """MoME's mixtures, for ``model.language`` with images and instructions.

    Attributes:
        sentence: a BERT or MiniLM directory with its tokenizer, which embeds the instructions; frozen.
        encoders: the branches of the vision mixture by name, each a transformers vision encoder's directory; frozen.
        experts: K, how many adapters stage ``clone`` makes of one, in each layer of the language model.
        hidden: an adapter's width.
        mix: of the branches: ``router``, by the instruction, or ``addition``, the ablation without one.
        size: side of the grid of visual tokens.
        options: of all branches.
        branches: of single branches, by name.
    """

    sentence: Path
    encoders: dict[str, Path]
    experts: int = 4
    hidden: int = 64
    mix: str = "router"
    size: int = 16
    options: Branch = Branch()
    branches: dict[str, Branch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.encoders), "model.mome.encoders", "name at least one directory", "none")
        require(self.experts >= 2, "model.mome.experts", "be at least 2", self.experts)
        for name in ("hidden", "size"):
            value = getattr(self, name)
            require(value >= 1, f"model.mome.{name}", "be at least 1", value)
        one_of("model.mome.mix", self.mix, MIXES)
        for name in self.branches:
            one_of("model.mome.branches", name, tuple(self.encoders))


@dataclass(frozen=True)
class Model:
    """The vision model, what becomes of it, and what stands on top.

    Attributes:
        vision: a transformers vision checkpoint; its own projector is used where it has one.
        siglip: sizes of a random one instead.
        mome: MoME instead of a tower; it goes with ``language`` alone.
        projector: width of a new projector Linear-GELU-Linear; None: the checkpoint's own, or the language model's
            width, or none.
        expert_layers: how many last layers get experts.
        routing: ``direct``, ``score_threshold`` or ``score_difference``.
        against: the reference score of ``score_difference``.
        feature_layer: the hidden state that is the feature.
        router_hidden: width of the router's hidden layer; None for a linear router.
        head: ``classifier``: mean pooling and a linear layer over the training data's labels.
        language: a causal language model's directory with its tokenizer, for images with text.
    """

    vision: Path | None = None
    siglip: Siglip | None = None
    mome: Mome | None = None
    projector: int | None = None
    expert_layers: int = 2
    routing: str = "score_difference"
    against: str = "runner_up"
    feature_layer: int = -1
    router_hidden: int | None = None
    head: str | None = None
    language: Path | None = None

    def __post_init__(self) -> None:
        if self.mome is not None:
            self._check_mome()
            return
        one = (self.vision is None) != (self.siglip is None)
        require(one, "model", "have either vision or siglip", self._given("vision", "siglip"))
        one = (self.head is None) != (self.language is None)
        require(one, "model", "have either head or language", self._given("head", "language"))
        if self.head is not None:
            one_of("model.head", self.head, HEADS)
        width = self.projector
        require(width is None or width >= 1, "model.projector", "be at least 1", width)

    def _check_mome(self) -> None:
        require(self.language is not None, "model.language", "be given for model.mome", "none")
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            ours = field_.name in ("mome", "language") or value == field_.default
            require(ours, f"model.{field_.name}", "not be given for model.mome", value)

    def _given(self, *names: str) -> str:
        return " and ".join(name for name in names if getattr(self, name) is not None) or "neither"

    @property
    def kind(self) -> str:
        """What is learnt from: ``label``, ``text`` or ``instruction``."""
        if self.mome is not None:
            return "instruction"
        return "label" if self.language is None else "text"
