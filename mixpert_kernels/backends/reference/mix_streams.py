"""Defines mix_streams; sums over a tile are made tile by tile, so that its gradients are the same in any batch."""

import torch
from torch import Tensor


def mix_streams(
    logits: Tensor,  # (B, n)
    streams: list[Tensor],  # n of (B, L, D)
    cls: Tensor | None,  # (B, D)
) -> Tensor:  # (B, L + 1, D), or (B, L, D)
    g = weights_of(logits, streams)
    y = sum(g[:, i, None, None] * s for i, s in enumerate(streams)).to(streams[0].dtype)
    return y if cls is None else torch.cat([cls[:, None], y], 1)


def mix_streams_backward(
    dy: Tensor,  # as y
    logits: Tensor,
    streams: list[Tensor],
    has_cls: bool,
    needs: list[bool],  # of logits, streams
) -> tuple[Tensor, list[Tensor]]:  # (B, n), n of (B, L, D); empty where not needed
    needs_logits, needs_streams = needs
    g = weights_of(logits, streams)
    dy = dy[:, 1:] if has_cls else dy
    dlogits, dstreams = logits.new_empty(0), []
    if needs_logits:
        dg = [torch.stack([_dot(*pair) for pair in zip(dy, s, strict=True)]) for s in streams]
        dg = torch.stack(dg, 1).to(g.dtype)  # (B, n)
        dlogits = (g * (dg - (g * dg).sum(1, keepdim=True))).to(logits.dtype)
    if needs_streams:
        dstreams = [(g[:, i, None, None] * dy).to(s.dtype) for i, s in enumerate(streams)]
    return dlogits, dstreams


def weights_of(logits: Tensor, streams: list[Tensor]) -> Tensor:
    """softmax(logits), in float32 or better."""
    dtype = torch.promote_types(streams[0].dtype, torch.float32)
    return torch.softmax(logits.to(dtype), 1)


def _dot(dy: Tensor, stream: Tensor) -> Tensor:
    """<dy, stream> of one tile, in float32 or better."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (dy.to(wide) * stream.to(wide)).flatten().sum()
