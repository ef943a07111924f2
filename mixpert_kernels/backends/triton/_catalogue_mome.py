"""MoME's host functions at the sizes of its reference model, for ``_catalogue``; needs no GPU.

DINOv2's 32 x 32 patches of 1024 channels, Pix2Struct's up to 2048 an image of 768, a language model 4096 wide; four
adapters of 64 hidden numbers on 600 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MomeGeometry:
    """Tensors without memory, of the sizes of the reference model."""

    dtype: torch.dtype = torch.bfloat16
    B: int = 8
    side: int = 16  # of the grid of queries
    C: int = 1024
    patches: int = 32 * 32  # an image, on average
    heads: int = 8
    points: int = 4
    layers: int = 6
    D: int = 4096
    streams: int = 3
    K: int = 4
    H: int = 64
    T: int = 600

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")

    @property
    def rows(self) -> int:
        return self.B * self.patches

    @property
    def grids(self) -> tuple[Tensor, Tensor]:
        """sizes, cu_seqlens."""
        return tuple(self.new(*shape, dtype=torch.int32) for shape in ((self.B, 2), (self.B + 1,)))

    @property
    def ids(self) -> tuple[Tensor | None, ...]:
        """expert, order, offsets, cu_seqlens."""
        return *(self.new(n, dtype=torch.int32) for n in (self.B, self.B, self.K + 1)), None


@dataclass
class PixelGeometry(MomeGeometry):
    """Pix2Struct's branch."""

    C: int = 768
    patches: int = 2048


def _pool(g: MomeGeometry):
    from .adaptive_pool import adaptive_pool

    adaptive_pool(g.new(g.rows, g.C), *g.grids, g.side, g.side)


def _pool_backward(g: MomeGeometry):
    from .adaptive_pool import adaptive_pool_backward

    dy = g.new(g.B, g.side**2, g.C)
    adaptive_pool_backward(dy, *g.grids, g.rows, g.side, g.side)


def _mixed(g: MomeGeometry) -> tuple[Tensor, list[Tensor]]:
    """logits, streams."""
    streams = [g.new(g.B, g.side**2, g.D) for _ in range(g.streams)]
    return g.new(g.B, g.streams), streams


def _mix(g: MomeGeometry):
    from .mix_streams import mix_streams

    mix_streams(*_mixed(g), g.new(g.B, g.D))


def _mix_backward(g: MomeGeometry):
    from .mix_streams import mix_streams_backward

    dy = g.new(g.B, g.side**2 + 1, g.D)
    mix_streams_backward(dy, *_mixed(g), True, [True, True])


def _places(g: MomeGeometry) -> tuple[Tensor, ...]:
    """value, a slice of all layers', offsets, logits, reference."""
    shape = (g.B, g.side**2, g.heads, g.points)
    value = g.new(g.rows, g.layers, g.heads, g.C // g.heads)[:, 1]
    return value, g.new(*shape, 2), g.new(*shape), g.new(shape[1], 2)


def _deform(g: MomeGeometry):
    from .deform_attn import deform_attn

    deform_attn(*_places(g), *g.grids)


def _deform_backward(g: MomeGeometry, fixed: bool):
    from .deform_attn import deform_attn_backward

    dy = g.new(g.B, g.side**2, g.C)
    needs = [True, not fixed, not fixed, not fixed]
    deform_attn_backward(dy, *_places(g), *g.grids, fixed, needs)


def _adapters(g: MomeGeometry) -> list[Tensor]:
    """down, down_bias, up, up_bias, scale."""
    shapes = (g.K, g.H, g.D), (g.K, g.H), (g.K, g.D, g.H), (g.K, g.D), (g.K,)
    return [g.new(*shape) for shape in shapes]


def _adapter(g: MomeGeometry, tokens: int, train: bool):
    from .grouped_adapter import grouped_adapter

    x = g.new(g.B, tokens, g.D)
    grouped_adapter(x, *_adapters(g), *g.ids, x, train)


def _adapter_backward(g: MomeGeometry, router: bool):
    from .grouped_adapter import grouped_adapter_backward

    dy, hidden = g.new(g.B, g.T, g.D), g.new(g.B, g.T, g.H)
    needs = [True] * 6 + [router]
    grouped_adapter_backward(dy, dy, *_adapters(g), hidden, *g.ids, needs)


MOME: dict[str, Callable[[MomeGeometry], None]] = {
    "adapter": lambda g: _adapter(g, g.T, False),
    "adapter on one token": lambda g: _adapter(g, 1, False),
    "adapter in training": lambda g: _adapter(g, g.T, True),
    "adapter backward": lambda g: _adapter_backward(g, True),
    "adapter backward, no router": lambda g: _adapter_backward(g, False),
    "pool": _pool,
    "pool backward": _pool_backward,
    "deform": _deform,
    "deform backward": lambda g: _deform_backward(g, False),
    "deform backward, fixed order": lambda g: _deform_backward(g, True),
    "mix": _mix,
    "mix backward": _mix_backward,
}
PIX2STRUCT: dict[str, Callable[[MomeGeometry], None]] = {
    "pool of 768": _pool,
    "pool backward of 768": _pool_backward,
    "deform of 96": _deform,
    "deform backward of 96, fixed order": lambda g: _deform_backward(g, True),
}
