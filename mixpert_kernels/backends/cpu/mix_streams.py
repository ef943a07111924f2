"""mix_streams on a CPU: stream by stream into the result, which is the only memory taken."""

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.mix_streams import (
    mix_streams_backward as mix_streams_backward,
)
from mixpert_kernels.backends.reference.mix_streams import weights_of


def mix_streams(
    logits: Tensor,  # (B, n)
    streams: list[Tensor],  # n of (B, L, D)
    cls: Tensor | None,  # (B, D)
) -> Tensor:  # (B, L + 1, D), or (B, L, D)
    g = weights_of(logits, streams)[..., None, None]  # (B, n, 1, 1)
    batch, tokens, width = streams[0].shape
    y = g.new_empty(batch, tokens + (cls is not None), width)
    mixed = y if cls is None else y[:, 1:]
    torch.mul(streams[0], g[:, 0], out=mixed)
    for i, stream in enumerate(streams[1:], 1):
        mixed.addcmul_(stream, g[:, i])
    if cls is not None:
        y[:, 0] = cls
    return y.to(streams[0].dtype)
