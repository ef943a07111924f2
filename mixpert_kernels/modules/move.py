"""MixtureOfVisionExperts: what several frozen vision encoders see, mixed as the instruction asks for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixpert_kernels.grids import Grids, require_grids
from mixpert_kernels.ops import adaptive_pool, mix_streams
from mixpert_kernels.ops.mix_streams import MAX_STREAMS
from mixpert_kernels.routing import Routing

from .adt import AdaptiveDeformableTransform
from .shared import shared_linear, shared_mlp

TRANSFORMS = ("deformable", "standard", "pool", "none")
MIXES = ("router", "addition")


class Features(NamedTuple):
    """What an encoder makes of B images.

    Attributes:
        rows: (R, C), the patches of all images, packed.
        grids: which rows are which image's.
        cls: (B, C), a token of each image as a whole, or None.
    """

    rows: Tensor
    grids: Grids
    cls: Tensor | None = None


class VisionBranch(nn.Module):
    """One vision expert: a frozen encoder, its features as size x size tokens, and those in the LLM's width.

    The encoder never trains: its parameters take no gradient, it stays in evaluation mode and runs without autograd.

    Args:
        encoder: any module with ``encoder(**inputs) -> Features``.
        width: C, of its features.
        llm_width: D.
        transform: ``deformable`` (AdaptiveDeformableTransform), ``standard`` (the same with standard cross-attention),
            ``pool`` (adaptive average pooling) or ``none`` (the features are on a grid of that size already).
        size: side of the grid of tokens.
        norm: whether a LayerNorm comes before the projection.
        cls: whether the encoder's token of the whole image is normalised and projected as the others are.
        layers, heads, points, ffn, dropout: of the AdaptiveDeformableTransform.

    Shape: ``Features`` of B images -> (B, size * size, D), and (B, D) or None. ``encode`` makes the features.

    Raises:
        ValueError: an unknown transform, a number out of range; in forward, features of another width or a grid of
            another size, or no ``cls``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        llm_width: int,
        *,
        transform: str = "deformable",
        size: int = 16,
        norm: bool = False,
        cls: bool = False,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        ffn: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        wanted = f"be one of {', '.join(TRANSFORMS)}"
        _require("VisionBranch", transform in TRANSFORMS, "transform", wanted, transform)
        for name, n in {"width": width, "llm_width": llm_width, "size": size}.items():
            _require("VisionBranch", n >= 1, name, "be at least 1", n)
        self.encoder = encoder.requires_grad_(False).eval()
        self.width, self.llm_width, self.size, self.how, self.cls = (
            width,
            llm_width,
            size,
            transform,
            cls,
        )
        numbers = {"layers": layers, "heads": heads, "points": points, "ffn": ffn}
        self.transform = (
            AdaptiveDeformableTransform(
                width, **numbers, size=size, dropout=dropout, cross=transform
            )
            if transform in ("deformable", "standard")
            else None
        )
        self.norm = nn.LayerNorm(width) if norm else None
        self.proj = nn.Linear(width, llm_width)

    def train(self, mode: bool = True) -> VisionBranch:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> Features:
        """The encoder's features of these inputs, which take no gradient."""
        return self.encoder(**inputs)

    def forward(self, features: Features) -> tuple[Tensor, Tensor | None]:
        rows, grids, cls = features
        self._check(features)
        routing = Routing.single(grids.batch, rows.device)
        dtype = self.proj.weight.dtype
        tokens = self._projected(self._tokens(rows.to(dtype), grids), routing)
        if not self.cls:
            return tokens, None
        return tokens, self._projected(cls.to(dtype)[:, None], routing)[:, 0]

    def _tokens(self, rows: Tensor, grids: Grids) -> Tensor:  # (B, L, C)
        if self.how == "none":
            return rows.view(grids.batch, self.size**2, self.width)
        if self.how == "pool":
            return adaptive_pool(rows, grids, height=self.size, width=self.size)
        return self.transform(rows, grids)

    def _projected(self, tokens: Tensor, routing: Routing) -> Tensor:  # (B, T, D)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return shared_linear(tokens, (self.proj,), routing)

    def _check(self, features: Features) -> None:
        rows, grids, cls = features
        wanted = f"have shape (R, {self.width})"
        fits = rows.ndim == 2 and rows.shape[1] == self.width
        _require("VisionBranch", fits, "features.rows", wanted, tuple(rows.shape))
        require_grids("VisionBranch", grids, rows, "features.rows")
        if self.cls:
            wanted, got = (grids.batch, self.width), None if cls is None else tuple(cls.shape)
            _require("VisionBranch", got == wanted, "features.cls", f"have shape {wanted}", got)
        if self.how != "none":
            return
        wanted = f"be {self.size} x {self.size} each where there is no transform"
        fits = rows.shape[0] == grids.batch * self.size**2
        _require("VisionBranch", fits, "features.grids", wanted, f"{rows.shape[0]} rows")
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            for size in grids.sizes.tolist():
                fits = size == [self.size, self.size]
                _require("VisionBranch", fits, "features.grids", wanted, " x ".join(map(str, size)))


class MixtureOfVisionExperts(nn.Module):
    """The branches' tokens, weighted by a router that reads the instruction, and the token of the whole image.

    ``sum_i g_i tokens_i`` with ``g = softmax(W2 gelu(W1 s))``, s the instruction's sentence embedding; a branch with
    ``cls=True`` gives the token that is put before them, unweighted.

    Args:
        branches: by name, in the order of the router's weights.
        llm_width: D.
        sentence_width: of the embedding.
        mix: ``router``, or ``addition``: every weight is 1 (an ablation).

    Shape: by the name of each branch, its encoder's inputs or its ``Features``, and (B, sentence_width) embeddings ->
    (B, 1 + L, D), or (B, L, D) where no branch has a ``cls``.

    Raises:
        ValueError: no branch, more than 8 with a router, branches of other widths or sizes, more than one ``cls``, an
            unknown ``mix``; in forward, a branch missing or unknown, or another number of instructions than of images.
    """

    def __init__(
        self,
        branches: Mapping[str, VisionBranch],
        llm_width: int,
        sentence_width: int = 384,
        mix: str = "router",
    ) -> None:
        super().__init__()
        _require(_MOVE, len(branches) > 0, "branches", "hold at least one", "none")
        _require(_MOVE, mix in MIXES, "mix", f"be one of {', '.join(MIXES)}", mix)
        few, wanted = len(branches) <= MAX_STREAMS, f"be at most {MAX_STREAMS} beside a router"
        _require(_MOVE, few or mix == "addition", "branches", wanted, len(branches))
        sizes = {(branch.llm_width, branch.size) for branch in branches.values()}
        wanted = f"give width {llm_width} on a grid of one size"
        fits = len(sizes) == 1 and sizes.pop()[0] == llm_width
        got = [(name, b.llm_width, b.size) for name, b in branches.items()]
        _require(_MOVE, fits, "branches", wanted, got)
        with_cls = [name for name, branch in branches.items() if branch.cls]
        _require(_MOVE, len(with_cls) <= 1, "branches", "have at most one with cls", with_cls)
        self.branches = nn.ModuleDict(branches)
        self.sentence_width, self.mix = sentence_width, mix
        self.router = (
            nn.Sequential(
                nn.Linear(sentence_width, sentence_width),
                nn.GELU(),
                nn.Linear(sentence_width, len(branches)),
            )
            if mix == "router"
            else None
        )

    def forward(
        self, inputs: Mapping[str, Mapping[str, Any] | Features], instruction: Tensor | None
    ) -> Tensor:
        missing, unknown = (
            self.branches.keys() - inputs.keys(),
            inputs.keys() - self.branches.keys(),
        )
        wanted = f"be of the branches {', '.join(self.branches)}"
        _require(_MOVE, not missing, "inputs", wanted, f"none of {', '.join(sorted(missing))}")
        _require(_MOVE, not unknown, "inputs", wanted, ", ".join(sorted(unknown)))
        self._check(instruction)
        features = {}
        for name, branch in self.branches.items():
            given = inputs[name]
            features[name] = given if isinstance(given, Features) else branch.encode(given)
            self._check(instruction, name, features[name].grids.batch)
        made = [branch(features[name]) for name, branch in self.branches.items()]
        streams = [tokens for tokens, _ in made]
        cls = next((token for _, token in made if token is not None), None)
        if self.router is None:
            mixed = functools.reduce(torch.add, streams)
            return mixed if cls is None else torch.cat([cls[:, None], mixed], 1)
        return mix_streams(self._logits(instruction), streams, cls)

    def weights(self, instruction: Tensor) -> Tensor:
        """The weight of each branch: (B, sentence_width) -> (B, n), float32.

        Raises:
            ValueError: the instruction has another shape.
        """
        self._check(instruction)
        if self.router is None:
            return instruction.new_ones(len(instruction), len(self.branches), dtype=torch.float32)
        return self._logits(instruction).softmax(-1, dtype=torch.float32)

    def _logits(self, instruction: Tensor) -> Tensor:  # (B, n)
        routing = Routing.single(len(instruction), instruction.device)
        s = instruction.to(self.router[0].weight.dtype)[:, None]
        return shared_mlp(s, *self.router, routing)[:, 0]

    def _check(self, instruction: Tensor | None, name: str = "", images: int | None = None) -> None:
        if self.router is None and instruction is None:
            return
        got = tuple(instruction.shape) if isinstance(instruction, Tensor) else instruction
        fits = isinstance(got, tuple) and len(got) == 2 and got[1] == self.sentence_width
        _require(_MOVE, fits, "instruction", f"have shape (B, {self.sentence_width})", got)
        if images is not None:
            wanted = f"be one for each of the {images} images of {name!r}"
            _require(_MOVE, got[0] == images, "instruction", wanted, got[0])

    def extra_repr(self) -> str:
        return f"mix={self.mix!r}"


_MOVE = "MixtureOfVisionExperts"


def _require(what: str, holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}: {name} must {condition}, got {got}")
