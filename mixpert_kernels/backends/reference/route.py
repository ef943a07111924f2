"""Defines route: pool, score, decide, sort."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpert_kernels.routing import counting_sort

from .tiles import spread, tiles


def pool(
    x: Tensor, cu_seqlens: Tensor | None, base_tile: Tensor | None
) -> Tensor:  # (I, D) float32, or float64 for float64
    """Mean over the tokens of each image's base tile; NaN for one without tokens."""
    base = tiles(x, cu_seqlens)
    if base_tile is not None and cu_seqlens is None:
        base = x.index_select(0, base_tile)
    elif base_tile is not None:
        base = [base[i] for i in base_tile.tolist()]
    return torch.stack([tile.mean(0, dtype=accumulator(x)) for tile in base])


def score(
    pooled: Tensor,  # (I, D)
    norm_weight: Tensor,
    norm_bias: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:  # (I, E) logits
    """LayerNorm, then linear or linear-GELU-linear."""
    z = F.layer_norm(pooled, pooled.shape[-1:], norm_weight, norm_bias, eps)
    if hidden_weight is not None:
        z = F.gelu(F.linear(z, hidden_weight, hidden_bias))
    return F.linear(z, weight, bias)


def decide(scores: Tensor, strategy: str, threshold: float, against: str) -> Tensor:  # (I,)
    """The expert of each image; ties go to the lowest index, non-finite scores to expert 0."""
    top, expert = scores.max(-1)[0], scores.argmax(-1)
    if strategy == "score_threshold":
        expert = torch.where(top >= threshold, expert, 0)
    elif strategy == "score_difference":
        if against == "versatile":
            reference = scores[:, 0]
        else:
            winner = F.one_hot(expert, scores.shape[-1]).bool()
            reference = scores.masked_fill(winner, float("-inf")).amax(-1)
        expert = torch.where(top - reference >= threshold, expert, 0)
    return torch.where(scores.isfinite().all(-1), expert, 0)


def route(
    x: Tensor,  # (B, T, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    image_of_tile: Tensor | None,  # (B,) int64
    base_tile: Tensor | None,  # (I,) int64
    expert: Tensor | None,  # (I,) forced
    norm_weight: Tensor,  # (D,)
    norm_bias: Tensor,
    hidden_weight: Tensor | None,  # (h, D)
    hidden_bias: Tensor | None,
    weight: Tensor,  # (E, D or h)
    bias: Tensor,  # (E,)
    eps: float,
    strategy: str,
    threshold: float,
    against: str,
) -> tuple[Tensor, ...]:  # scores (I, E), pooled (I, D), expert, order, offsets
    dtype = accumulator(x)
    pooled = pool(x, cu_seqlens, base_tile)
    params = [
        None if p is None else p.to(dtype)
        for p in (norm_weight, norm_bias, hidden_weight, hidden_bias, weight, bias)
    ]
    logits = [score(z, *params, eps) for z in pooled.split(1)]  # bitwise the same in any batch
    scores = torch.cat(logits).softmax(-1)
    chosen = decide(scores, strategy, threshold, against) if expert is None else expert
    of_tile = chosen if image_of_tile is None else chosen[image_of_tile]
    return (scores, pooled, *counting_sort(of_tile, weight.shape[0]))


def route_backward(
    dscores: Tensor,  # (I, E)
    dpooled: Tensor,  # (I, D)
    x: Tensor,  # (B, T, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    base_tile: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    pooled: Tensor,
    eps: float,
    needs_x: bool,
) -> list[Tensor]:  # dx, dnorm_weight, dnorm_bias, dhidden_weight, dhidden_bias, dweight, dbias
    dtype = pooled.dtype
    gamma, beta = norm_weight.to(dtype), norm_bias.to(dtype)
    h, mean, rstd = torch.native_layer_norm(pooled, pooled.shape[-1:], gamma, beta, eps)
    dlogits = torch.ops.aten._softmax_backward_data(dscores, scores, -1, dtype)
    empty = x.new_empty(0)
    dhidden_weight, dhidden_bias = empty, empty
    last = h
    if hidden_weight is not None:
        z = _by_image(h, hidden_weight.to(dtype).T) + hidden_bias.to(dtype)
        last = F.gelu(z)
    dweight, dbias = dlogits.T @ last, dlogits.sum(0)
    dh = _by_image(dlogits, weight.to(dtype))
    if hidden_weight is not None:
        dz = torch.ops.aten.gelu_backward(dh, z)
        dhidden_weight, dhidden_bias = dz.T @ h, dz.sum(0)
        dh = _by_image(dz, hidden_weight.to(dtype))
    dz, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dh, pooled, pooled.shape[-1:], mean, rstd, gamma, beta, [True, True, True]
    )
    dx = empty
    if needs_x:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        base = torch.arange(batch, device=x.device) if base_tile is None else base_tile
        tokens = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()[base][:, None]
        rows = ((dz + dpooled) / tokens).to(x.dtype)
        by_tile = x.new_zeros(batch, x.shape[-1]).index_add_(0, base, rows)
        dx = spread(by_tile, x, cu_seqlens).expand(x.shape).contiguous()
    grads = [dgamma, dbeta, dhidden_weight, dhidden_bias, dweight, dbias]
    return [dx, *(g.to(weight.dtype) for g in grads)]


def _by_image(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, an image at a time: bitwise the same in any batch."""
    return torch.cat([row @ matrix for row in rows.split(1)])


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
