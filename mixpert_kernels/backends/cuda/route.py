"""route in one launch (and one memset): pool, score, decide, sort, without a word to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _configs, _launch
from ._operands import Rows, cdiv, rows_dense, strides
from ._route_backward import route_backward

__all__ = ["route", "route_backward"]

# csrc/cuda/route.cuh, Rule.
RULES = {"direct": 0, "score_threshold": 1, "runner_up": 2, "versatile": 3}


def route(
    x: Tensor,  # (B, T, D) or (R, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    image_of_tile: Tensor | None,  # (B,)
    base_tile: Tensor | None,  # (I,)
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
    kernel = f"route_{_configs.SUFFIX[x.dtype]}"
    x, rows = rows_dense(x), Rows.of(x, cu_seqlens)
    router = (norm_weight, norm_bias, hidden_weight, hidden_bias, weight, bias)
    args, routed = router_arguments(
        kernel,
        x,
        rows,
        (image_of_tile, base_tile, expert),
        router,
        (eps, strategy, threshold, against),
    )
    images = routed["scores"].shape[0]
    args |= place_counters(x.new_zeros(2 * images + 1, dtype=torch.int32), images)
    args |= {"x": x, **strides("stride_x{}", x, "bt"), **rows.arguments(), "width": x.shape[-1]}
    _launch.launch(kernel, args["partials"].shape[0], args)
    scores, pooled, *ids = routed.values()
    return scores, pooled, *ids


def router_arguments(
    kernel: str,
    x: Tensor,  # (B, T, D) or (R, D)
    rows: Rows,
    tiles: tuple[Tensor | None, ...],  # image_of_tile, base_tile, forced
    router: tuple[Tensor | None, ...],  # six parameters
    rule: tuple[float, str, float, str],  # eps, strategy, threshold, against
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a kernel that routes takes beside x and its counters; and of it the results, in the order of ``route``."""
    batch, width = rows.batch, x.shape[-1]
    image_of_tile, base_tile, forced = (
        None if t is None else t.to(torch.int64).contiguous() for t in tiles
    )
    floats, router = _alike(router, x.dtype)
    norm_weight, norm_bias, hidden_weight, hidden_bias, weight, bias = router
    images = batch if base_tile is None else base_tile.shape[0]
    experts, hidden = weight.shape[0], 0 if hidden_weight is None else hidden_weight.shape[0]
    eps, strategy, threshold, against = rule
    routed = {
        "scores": x.new_empty(images, experts, dtype=torch.float32),
        "pooled": x.new_empty(images, width, dtype=torch.float32),
        "expert": x.new_empty(batch, dtype=torch.int32),
        "order": x.new_empty(batch, dtype=torch.int32),
        "offsets": x.new_empty(experts + 1, dtype=torch.int32),
    }
    size = _launch.kernels()[kernel].constants["pool_rows"]
    # Row blocks of images' base tiles, or of all tiles: which of those are base tiles, the host does not know.
    uniform = rows.cu_seqlens is None
    blocks = images * cdiv(rows.tokens, size) if uniform else rows.blocks(size)
    args = {
        "image_of_tile": image_of_tile,
        "base_tile": base_tile,
        "forced": forced,
        "router_norm_weight": norm_weight,
        "router_norm_bias": norm_bias,
        "router_hidden_weight": hidden_weight,
        "router_hidden_bias": hidden_bias,
        "router_weight": weight,
        "router_bias": bias,
        **routed,
        "partials": x.new_empty(blocks, width, dtype=torch.float32),
        "router_vectors": x.new_empty(images, width + hidden + experts, dtype=torch.float32),
        "batch": batch,
        "images": images,
        "experts": experts,
        "hidden": hidden,
        "router_floats": floats,
        "rule": RULES.get(strategy, RULES[against]),
        "threshold": threshold,
        "router_eps": eps,
    }
    return args, routed


def place_counters(counters: Tensor, images: int) -> dict[str, Tensor]:
    """The first 2 I + 1 of a launch's zeros, as the kernel calls them."""
    arrived, scored, ids = counters[: 2 * images + 1].split([images, 1, images])
    return {"arrived": arrived, "scored": scored, "ids": ids}


def _alike(
    router: tuple[Tensor | None, ...], dtype: torch.dtype
) -> tuple[bool, list[Tensor | None]]:
    """The parameters in one dtype, that of the features or else float32; and whether it is float32."""
    floats = any(p is not None and p.dtype != dtype for p in router) or dtype == torch.float32
    wanted = torch.float32 if floats else dtype
    return floats, [None if p is None else p.to(wanted).contiguous() for p in router]
