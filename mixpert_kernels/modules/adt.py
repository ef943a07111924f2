"""AdaptiveDeformableTransform: features on a grid of any size become size x size tokens."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpert_kernels.grids import Grids, require_grids
from mixpert_kernels.ops import adaptive_pool, deform_attn
from mixpert_kernels.routing import Routing

from .shared import shared_linear, shared_mlp

CROSS = ("deformable", "standard")


class AdaptiveDeformableTransform(nn.Module):
    """Adaptively pooled queries attend to each other and, by deformable attention, to all of an image's features.

    ``layers`` post-norm layers of self-attention, cross-attention and a ReLU MLP, from ``adaptive_pool(f)``. The
    features never change, so the value projections of all layers are one product. Parameters have the names and the
    meaning of transformers' Deformable-DETR decoder layers; ``reference_points`` are (x, y) from 0 to 1.

    Args:
        width: C, of the features and the tokens.
        layers: how many.
        heads: of each attention; they divide C.
        points: sampled by each head and query.
        ffn: hidden width of the MLP.
        size: side of the grid of tokens, L = size * size.
        dropout: of what each of a layer's three parts adds, in training.
        cross: ``deformable``, or ``standard`` for an attention to all features (an ablation).

    Shape: (R, C) packed features and their ``Grids`` -> (B, L, C).

    Raises:
        ValueError: a number is out of range, ``heads`` does not divide ``width``, or ``cross`` is unknown; in forward,
            features of another width, or grids that do not fit them.

    Example:
        >>> transform = AdaptiveDeformableTransform(16, layers=1, heads=2, ffn=8, size=2)
        >>> transform(torch.randn(12 + 5, 16), Grids.of([(3, 4), (1, 5)])).shape
        torch.Size([2, 4, 16])

    Source: docs/mome.md.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        ffn: int = 1024,
        size: int = 16,
        dropout: float = 0.1,
        cross: str = "deformable",
    ) -> None:
        super().__init__()
        numbers = dict(width=width, layers=layers, heads=heads, points=points, ffn=ffn, size=size)
        for name, n in numbers.items():
            _require(n >= 1, name, "be at least 1", n)
        _require(width % heads == 0, "width", f"be a multiple of heads, {heads}", width)
        _require(0 <= dropout < 1, "dropout", "be at least 0 and below 1", dropout)
        _require(cross in CROSS, "cross", f"be one of {', '.join(CROSS)}", cross)
        self.width, self.heads, self.points, self.size = width, heads, points, size
        self.cross = cross
        self.layers = nn.ModuleList(
            AdaptiveDeformableLayer(width, heads, points, ffn, dropout, cross)
            for _ in range(layers)
        )
        self.position_embeddings = nn.Parameter(torch.empty(1, size * size, width))
        if cross == "deformable":
            self.reference_points = nn.Parameter(torch.empty(1, size * size, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as LayerNorms of the pooled features, with reference points on a grid that includes the borders."""
        nn.init.zeros_(self.position_embeddings)
        if self.cross == "deformable":
            side = torch.linspace(0, 1, self.size, device=self.reference_points.device)
            y, x = torch.meshgrid(side, side, indexing="ij")
            self.reference_points.copy_(torch.stack([x, y], -1).view(1, -1, 2))
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, f: Tensor, grids: Grids) -> Tensor:
        fits = f.ndim == 2 and f.shape[1] == self.width
        _require(fits, "f", f"have shape (R, {self.width})", tuple(f.shape))
        require_grids("AdaptiveDeformableTransform", grids, f, "f")
        routing = Routing.single(grids.batch, f.device)
        h = adaptive_pool(f, grids, height=self.size, width=self.size)  # (B, L, C)
        if self.cross == "deformable":
            where: Sampled | Padded = Sampled(grids, self.reference_points[0])
            rows = routing._replace(cu_seqlens=grids.cu_seqlens)
        else:
            f, where = _padded(f, grids)
            rows = routing
        # f never changes, so what the layers attend to is one product for all of them.
        leaves = tuple(leaf for layer in self.layers for leaf in layer.encoder_attn.of_features)
        memories = shared_linear(f, leaves, rows).unflatten(-1, (len(self.layers), -1)).unbind(-2)
        for layer, memory in zip(self.layers, memories, strict=True):
            h = layer(h, self.position_embeddings, memory, where, routing)
        return h

    def extra_repr(self) -> str:
        return f"{self.width}, heads={self.heads}, points={self.points}, size={self.size}, cross={self.cross!r}"


class Sampled(NamedTuple):
    """Where a deformable cross-attention samples: the grids of packed features, and a point (x, y) for each query."""

    grids: Grids
    reference: Tensor  # (L, 2)


class Padded(NamedTuple):
    """Which rows of padded features a standard cross-attention may look at; None: all."""

    mask: Tensor | None  # (B, 1, 1, M) bool


class AdaptiveDeformableLayer(nn.Module):
    """One layer: self-attention, cross-attention and MLP, each added to what it is of and normalised after."""

    def __init__(
        self, width: int, heads: int, points: int, ffn: int, dropout: float, cross: str
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention(width, heads)
        deformable = cross == "deformable"
        self.encoder_attn: DeformableAttention | CrossAttention = (
            DeformableAttention(width, heads, points)
            if deformable
            else CrossAttention(width, heads)
        )
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.activation = nn.ReLU()
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.final_layer_norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Start as three LayerNorms: what each part adds is zero."""
        for part in (self.self_attn, self.encoder_attn):
            part.reset_parameters()
        nn.init.xavier_uniform_(self.fc1.weight)
        _zero(self.fc2)
        nn.init.zeros_(self.fc1.bias)
        for norm in (
            self.self_attn_layer_norm,
            self.encoder_attn_layer_norm,
            self.final_layer_norm,
        ):
            norm.reset_parameters()

    def forward(
        self,
        h: Tensor,  # (B, L, C)
        position: Tensor,  # (1, L, C)
        memory: Tensor,  # (R, C), or (B, M, 2 C) where ``where`` is Padded
        where: Sampled | Padded,
        routing: Routing,
    ) -> Tensor:  # (B, L, C)
        y = self.self_attn(h, position, routing)
        h = self.self_attn_layer_norm(self._added(h, y, self.self_attn.out, routing))
        y = self.encoder_attn(h + position, memory, where, routing)
        h = self.encoder_attn_layer_norm(self._added(h, y, self.encoder_attn.out, routing))
        mlp = functools.partial(shared_mlp, h, self.fc1, self.activation, self.fc2, routing)
        h = h + F.dropout(mlp(), self.dropout) if self._drops else mlp(residual=h)
        return self.final_layer_norm(h)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _added(self, h: Tensor, y: Tensor, out: nn.Module, routing: Routing) -> Tensor:
        """h + dropout(out(y)), as one product where nothing is dropped."""
        if self._drops:
            return h + F.dropout(shared_linear(y, (out,), routing), self.dropout)
        return shared_linear(y, (out,), routing, residual=h)


class Attention(nn.Module):
    """Self-attention whose queries and keys, not its values, know their position. Without its output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        for leaf in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(leaf.weight)
            nn.init.zeros_(leaf.bias)
        _zero(self.out_proj)

    @property
    def out(self) -> nn.Module:
        return self.out_proj

    def forward(self, h: Tensor, position: Tensor, routing: Routing) -> Tensor:  # (B, L, C)
        qk = shared_linear(h + position, (self.q_proj, self.k_proj), routing)
        return _attend(*qk.chunk(2, -1), shared_linear(h, (self.v_proj,), routing), self.heads)


class CrossAttention(Attention):
    """The ablation: attention to all rows of an image's features, under the names of ``Attention``."""

    @property
    def of_features(self) -> tuple[nn.Module, ...]:
        return self.k_proj, self.v_proj

    def forward(self, u: Tensor, memory: Tensor, where: Padded, routing: Routing) -> Tensor:
        q = shared_linear(u, (self.q_proj,), routing)
        return _attend(q, *memory.chunk(2, -1), self.heads, where.mask)


class DeformableAttention(nn.Module):
    """Each head and query samples a few points near its reference point. Without its output projection."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(width, heads * points * 2)
        self.attention_weights = nn.Linear(width, heads * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Offsets: each head in a direction of its own, point k at k patches; all points count alike."""
        _zero(self.sampling_offsets)
        angle = torch.arange(self.heads, dtype=torch.float64) * (2 * math.pi / self.heads)
        directions = torch.stack([angle.cos(), angle.sin()], -1)  # (heads, 2)
        directions /= directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, -1, 1)
        self.sampling_offsets.bias.copy_((directions[:, None] * steps).flatten())
        _zero(self.attention_weights)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.zeros_(self.value_proj.bias)
        _zero(self.output_proj)

    @property
    def out(self) -> nn.Module:
        return self.output_proj

    @property
    def of_features(self) -> tuple[nn.Module, ...]:
        return (self.value_proj,)

    def forward(self, u: Tensor, memory: Tensor, where: Sampled, routing: Routing) -> Tensor:
        samples = self.heads * self.points
        both = shared_linear(u, (self.sampling_offsets, self.attention_weights), routing)
        offsets, logits = both.split([2 * samples, samples], -1)
        return deform_attn(
            memory.unflatten(-1, (self.heads, -1)),
            offsets.unflatten(-1, (self.heads, self.points, 2)),
            logits.unflatten(-1, (self.heads, self.points)),
            where.reference,
            where.grids,
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, L, C), twice (B, M, C) -> (B, L, C)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _padded(f: Tensor, grids: Grids) -> tuple[Tensor, Padded]:
    """Packed features (R, C) as (B, M, C), M the most rows of an image: the host waits for that number."""
    lengths = grids.cu_seqlens.diff()
    most = int(lengths.max())
    if f.shape[0] == grids.batch * most:
        return f.view(grids.batch, most, -1), Padded(None)
    place = torch.arange(most, device=f.device)
    mask = place < lengths[:, None]  # (B, M)
    rows = grids.cu_seqlens[:-1, None] + place
    return f[rows.clamp_max(f.shape[0] - 1)], Padded(mask[:, None, None])


def _zero(leaf: nn.Linear) -> None:
    nn.init.zeros_(leaf.weight)
    nn.init.zeros_(leaf.bias)


def _require(holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"AdaptiveDeformableTransform: {name} must {condition}, got {got}")
