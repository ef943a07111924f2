"""Defines grouped_adapter: tile by tile, so that a tile's result is bitwise the same in any batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped_linear import add_by_expert, row
from .tiles import joined, own_memory, tiles


def grouped_adapter(
    x: Tensor,  # (B, T, D)
    down: Tensor,  # (E, H, D)
    down_bias: Tensor,  # (E, H)
    up: Tensor,  # (E, D, H)
    up_bias: Tensor,  # (E, D)
    scale: Tensor,  # (E,)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    residual: Tensor | None,  # (B, T, D)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, D), hidden (B, T, H) or empty
    down, down_bias, up, up_bias, scale = (
        p.to(x.dtype) for p in (down, down_bias, up, up_bias, scale)
    )
    hs, ys = [], []
    for x_b, e in zip(own_memory(x, cu_seqlens), expert, strict=True):
        hs.append(F.linear(x_b, row(down, e), row(down_bias, e)).relu())
        ys.append(F.linear(hs[-1], row(up, e), row(up_bias, e)) * row(scale, e))
    y = added(joined(ys, cu_seqlens), residual)
    return y, joined(hs, cu_seqlens) if for_backward else x.new_empty(0)


def added(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual; where y is 0 the residual itself, for -0 + 0 is 0."""
    return y if residual is None else torch.where(y == 0, residual, y + residual)


def grouped_adapter_backward(
    dy: Tensor,  # (B, T, D)
    x: Tensor,  # (B, T, D)
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    hidden: Tensor,  # (B, T, H)
    expert: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    needs: list[bool],  # of x, down, down_bias, up, up_bias, scale, probabilities
) -> list[Tensor]:  # in that order, empty where not needed
    needs_x, needs_down, _, needs_up, _, needs_scale, needs_probabilities = needs
    ddown, dup = (torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (down, up))
    dxs, rows_down, rows_up, inners = [], [], [], []
    every = torch.arange(len(scale), device=expert.device)
    batch = (own_memory(t, cu_seqlens) for t in (dy, x))
    for dy_b, x_b, h, e in zip(*batch, tiles(hidden, cu_seqlens), expert, strict=True):
        dz = (dy_b @ row(up, e) * row(scale, e)).where(h > 0, 0)  # (T, H)
        dxs.append(dz @ row(down, e) if needs_x else dz)
        rows_down.append(dz.sum(0))
        rows_up.append(dy_b.sum(0) * row(scale, e))
        if needs_down:
            ddown.index_add_(0, e.reshape(1), (dz.T @ x_b)[None])
        if needs_up:
            dup.index_add_(0, e.reshape(1), (dy_b.T @ (h * row(scale, e)))[None])
        if needs_scale or needs_probabilities:
            asked = every if needs_probabilities else e.reshape(1)
            layers = ((row(p, k) for p in (down, down_bias, up, up_bias)) for k in asked)
            inners.append(torch.stack([inner(dy_b, x_b, *layer) for layer in layers]))
    grads = [
        joined(dxs, cu_seqlens),
        ddown,
        add_by_expert(torch.stack(rows_down), expert, down_bias),
        dup,
        add_by_expert(torch.stack(rows_up), expert, up_bias),
        dy.new_empty(0),
        dy.new_empty(0),
    ]
    if inners:
        inners = torch.stack(inners)  # (B, E), or (B, 1) of the chosen adapters
        chosen = inners.gather(1, expert.long()[:, None]) if needs_probabilities else inners
        dscale = inners.new_zeros(scale.shape).index_add_(0, expert, chosen.squeeze(1))
        grads[5] = dscale.to(scale.dtype)
        grads[6] = inners * scale.to(inners.dtype) if needs_probabilities else inners
    return [g if needed else dy.new_empty(0) for g, needed in zip(grads, needs, strict=True)]


def inner(
    dy: Tensor,  # (T, D), of a tile
    x: Tensor,  # (T, D)
    down: Tensor,  # (H, D), of one adapter, as are the others
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
) -> Tensor:  # scalar, in float32 or better
    """<dy, Adapter(x) / scale> from H hidden numbers a token instead of D outputs."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    h = F.linear(x, down, down_bias).relu()  # (T, H)
    g = dy @ up  # (T, H)
    return (h.to(wide) * g.to(wide)).sum() + up_bias.to(wide) @ dy.to(wide).sum(0)
