"""route in one launch (and one memset): pool, score, decide, sort, without a word to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._gemm import rows_dense
from ._route import images_of, partial_pool, score_image, sort_tiles
from ._route_backward import powers_of_two, route_backward
from ._tiles import Rows, locate_rows, strides

__all__ = ["route", "route_backward"]

RULES = {"direct": "direct", "score_threshold": "threshold"}  # a score difference: its reference


@triton.jit
def _arrive(
    image, blocks, rows, partial_ptr, scratch_ptr, image_of_tile_ptr, forced_ptr, norm_weight_ptr, norm_bias_ptr,
    hidden_weight_ptr, hidden_bias_ptr, weight_ptr, bias_ptr, scores_ptr, pooled_ptr, expert_ptr, order_ptr,
    offsets_ptr, counters_ptr, images, batch, eps, threshold, RULE: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    E: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Say that a block of an image's rows is pooled; the last to say so scores the image, and sorts after the last."""
    i = tl.cast(image, tl.int64)
    if tl.atomic_add(counters_ptr + image, 1, sem="acq_rel", scope="gpu") == blocks - 1:
        expert = score_image(
            partial_ptr, scratch_ptr + i * (H + E), norm_weight_ptr, norm_bias_ptr, hidden_weight_ptr,
            hidden_bias_ptr, weight_ptr, bias_ptr, pooled_ptr + i * D, scores_ptr + i * E, blocks, rows, eps,
            threshold, RULE, D, H, E, WIDTH, HIDDEN, BLOCK_E,
        )  # fmt: skip
        if forced_ptr is not None:
            expert = tl.load(forced_ptr + i).to(tl.int32)
        ids_ptr = counters_ptr + images + 1
        tl.store(ids_ptr + i, expert + 1)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + images, 1, sem="acq_rel", scope="gpu") == images - 1:
            sort_tiles(
                ids_ptr, image_of_tile_ptr, expert_ptr, order_ptr, offsets_ptr, batch, E, BLOCK_E
            )


@triton.jit(do_not_specialize=["images", "batch", "tokens"])
def _route_kernel(
    x_ptr,  # (B, T, D)
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    image_of_tile_ptr,  # (B,) or None
    base_tile_ptr,  # (I,) or None
    forced_ptr,  # (I,) or None
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    hidden_weight_ptr,  # (H, D) or None
    hidden_bias_ptr,  # (H,) or None
    weight_ptr,  # (E, H or D)
    bias_ptr,  # (E,)
    scores_ptr,  # (I, E) float32
    pooled_ptr,  # (I, D) float32
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    offsets_ptr,  # (E + 1,) int32
    workspace_ptr,  # (programs, D) and (I, H + E) float32
    counters_ptr,  # (2 I + 1,) int32, zeros: arrivals of each image, images scored, expert + 1 of each image
    images,
    batch,
    tokens,
    stride_xb,
    stride_xt,
    eps,
    threshold,
    RULE: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,  # images at a time, of packed rows
    BLOCK_D: tl.constexpr,
):
    # p[i] = mean_t x[base_tile[i], t];  scores[i] = softmax(router(p[i]));  the rule's expert of i serves all its tiles
    #
    # One program adds ROWS rows of one image's base tile. Grid: I * S with S = cdiv(T, ROWS), at least 1. Nobody waits:
    # the last program of an image to arrive scores it, and the last image to be scored writes expert, order and
    # offsets. Of packed rows, each block of each tile has a program, and those of no base tile leave at once: which
    # tiles are how long, the host does not know. An empty tile has a block, too, so that its image is scored.
    # An arrival releases what its program wrote and acquires what the others wrote. The barriers in front make it speak
    # for all warps: before 3.9, Triton puts none there.
    program = tl.program_id(0)
    if cu_seqlens_ptr is None:
        blocks = tl.maximum(tl.cdiv(tokens, ROWS), 1)
        first, block = program // blocks, program % blocks
        last = first + 1
        begin = first if base_tile_ptr is None else tl.load(base_tile_ptr + first)
        rows = tokens
    else:
        tile, begin, rows, row = locate_rows(program, batch, tokens, None, cu_seqlens_ptr, ROWS)
        blocks, block = tl.maximum(tl.cdiv(rows, ROWS), 1), row // ROWS
        first, last = images_of(tile, base_tile_ptr, images, SEARCH)
        if (block >= blocks) | (first >= last):
            return
    partial_ptr = workspace_ptr + program.to(tl.int64) * D
    x_ptr += begin.to(tl.int64) * stride_xb
    partial_pool(x_ptr, partial_ptr, block * ROWS, rows, stride_xt, D, ROWS, BLOCK_D)
    tl.debug_barrier()
    partial_ptr -= block * D
    scratch_ptr = workspace_ptr + tl.num_programs(0).to(tl.int64) * D
    if cu_seqlens_ptr is None:
        _arrive(
            first, blocks, rows, partial_ptr, scratch_ptr, image_of_tile_ptr, forced_ptr, norm_weight_ptr,
            norm_bias_ptr, hidden_weight_ptr, hidden_bias_ptr, weight_ptr, bias_ptr, scores_ptr, pooled_ptr,
            expert_ptr, order_ptr, offsets_ptr, counters_ptr, images, batch, eps, threshold, RULE, D, H, E, WIDTH,
            HIDDEN, BLOCK_E,
        )  # fmt: skip
    else:  # not one loop for both: it costs the registers of two programs
        for image in range(first, last):
            mine = True
            if base_tile_ptr is not None:
                mine = tl.load(base_tile_ptr + image) == tile
            if mine:
                _arrive(
                    image, blocks, rows, partial_ptr, scratch_ptr, image_of_tile_ptr, forced_ptr, norm_weight_ptr,
                    norm_bias_ptr, hidden_weight_ptr, hidden_bias_ptr, weight_ptr, bias_ptr, scores_ptr, pooled_ptr,
                    expert_ptr, order_ptr, offsets_ptr, counters_ptr, images, batch, eps, threshold, RULE, D, H, E,
                    WIDTH, HIDDEN, BLOCK_E,
                )  # fmt: skip


def route(
    x: Tensor,  # (B, T, D), packed (R, D)
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
    tiles, width = Rows.of(x, cu_seqlens), x.shape[-1]
    images = tiles.batch if base_tile is None else base_tile.shape[0]
    experts = weight.shape[0]
    hidden = 0 if hidden_weight is None else hidden_weight.shape[0]
    config = _configs.route_config(width)
    programs = images * max(triton.cdiv(tiles.tokens, config.rows), 1)
    if cu_seqlens is not None:
        programs = tiles.num_blocks(config.rows)
    x = rows_dense(x)
    routed = routing_outputs(x, tiles.batch, images, experts)
    pooled = x.new_empty(images, width, dtype=torch.float32)
    size = programs * width + images * (hidden + experts)
    tensors = {
        "image_of_tile_ptr": image_of_tile,
        "base_tile_ptr": base_tile,
        "forced_ptr": expert,
        "norm_weight_ptr": norm_weight,
        "norm_bias_ptr": norm_bias,
        "hidden_weight_ptr": hidden_weight,
        "hidden_bias_ptr": hidden_bias,
        "weight_ptr": weight,
        "bias_ptr": bias,
    }
    args = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    args |= {"x_ptr": x, "pooled_ptr": pooled, **routed}
    args["workspace_ptr"] = x.new_empty(size, dtype=torch.float32)
    args["counters_ptr"] = x.new_zeros(2 * images + 1, dtype=torch.int32)
    args |= {"images": images, **tiles.args, "batch": tiles.batch, **strides("stride_x{}", x)}
    args |= {"eps": eps, "threshold": threshold, "RULE": RULES.get(strategy, against)}
    args |= {"D": width, "H": hidden, "E": experts, **powers_of_two(width, hidden, experts)}
    args |= {"ROWS": config.rows, "BLOCK_D": config.block_d}
    args["SEARCH"] = 0 if cu_seqlens is None else _configs.ROUTE_SUMS.block_i
    _launch.launch(_route_kernel, (programs,), args, config)
    scores, *ids = routed.values()
    return scores, pooled, *ids


def routing_outputs(x: Tensor, batch: int, images: int, experts: int) -> dict[str, Tensor]:
    """What a launch that routes writes: scores (I, E), expert (B,), order (B,), offsets (E + 1,), in this order."""
    return {
        "scores_ptr": x.new_empty(images, experts, dtype=torch.float32),
        "expert_ptr": x.new_empty(batch, dtype=torch.int32),
        "order_ptr": x.new_empty(batch, dtype=torch.int32),
        "offsets_ptr": x.new_empty(experts + 1, dtype=torch.int32),
    }
