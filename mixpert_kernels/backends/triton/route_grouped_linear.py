"""route_grouped_linear in one launch (and one memset): programs that wait for none that starts after them.

Packed rows take the three launches of the separate ops.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixpert_kernels.backends.reference.route_grouped_linear import three_ops

from . import _configs, _launch
from ._gemm import alike, finish, locate, named, pick, product, rows_dense
from ._route import partial_pool, score_image, sort_tiles
from ._rows import aligned_rows, normalise_rows, row_pointers
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear
from .route import RULES, powers_of_two, route, routing_outputs

# About a minute. Interpreted programs run one after the other: what is not there at once never will be.
POLLS: tl.constexpr = tl.constexpr(1 if os.environ.get("TRITON_INTERPRET") == "1" else 2**26)
TRAPS = {True: "trap;", False: "s_trap 2"}  # NVIDIA, AMD

GIVEN = (  # the kernel's arguments that are tensors of the caller or None
    "image_of_tile_ptr",
    "base_tile_ptr",
    "forced_ptr",
    "router_norm_weight_ptr",
    "router_norm_bias_ptr",
    "hidden_weight_ptr",
    "hidden_bias_ptr",
    "router_weight_ptr",
    "router_bias_ptr",
    "norm_weight_ptr",
    "norm_bias_ptr",
)


@triton.jit
def _wait(ptr, least, TRAP: tl.constexpr):
    """Poll until the number at ptr is at least ``least``; acquire what its writers released before, and return it."""
    value = tl.full((), -1, tl.int32)
    polls = 0
    while (value < least) & (polls < POLLS):
        value = tl.atomic_add(ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    if value < least:
        REGISTERS: tl.constexpr = "=r,0" if TRAP == "trap;" else "=v,0"
        value = tl.inline_asm_elementwise(TRAP, REGISTERS, [value], tl.int32, is_pure=False, pack=1)
    return value


@triton.jit(do_not_specialize=["batch", "images", "tokens", "stride_xb", "stride_xt"])
def _route_grouped_linear_kernel(
    x_ptr,  # (B, T, D)
    image_of_tile_ptr,  # (B,) or None
    base_tile_ptr,  # (I,) or None
    forced_ptr,  # (I,) or None
    router_norm_weight_ptr,  # (D,)
    router_norm_bias_ptr,  # (D,)
    hidden_weight_ptr,  # (H, D) or None
    hidden_bias_ptr,  # (H,) or None
    router_weight_ptr,  # (E, H or D)
    router_bias_ptr,  # (E,)
    norm_weight_ptr,  # (E, D)
    norm_bias_ptr,  # (E, D) or None
    w0,  # (E, N, D); w1 and w2 likewise, or None
    w1,
    w2,
    b0_ptr,  # (E, N) or None, the bias of w0
    b1_ptr,
    b2_ptr,
    y_ptr,  # (B, T, weights * N)
    scores_ptr,  # (I, E) float32
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    offsets_ptr,  # (E + 1,) int32
    h_ptr,  # (B, T, D), the normalised rows
    workspace_ptr,  # (I, S, D), (I, D) and (I, H + E) float32
    counters_ptr,  # (2 + 2 I + B * cdiv(T, BLOCK_M),) int32, zeros
    batch,
    images,
    tokens,
    columns,
    depth,  # D, not known to the compiler: of a single step it would make a product that begins with the bias
    stride_xb,
    stride_xt,
    stride_we,
    stride_wn,
    router_eps,
    threshold,
    norm_eps,
    RULE: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM_ROWS: tl.constexpr,  # ROWS divides it, and it divides BLOCK_M
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRAP: tl.constexpr,
):
    # expert = route(x),  h[b, t] = LayerNorm_e(x[b, t]),  y[b, t, i * N + n] = act(h[b, t] . w_i[e, n] + bias_i[e, n])
    # with e = expert[b], i the weight.
    #
    # A program draws a ticket and does what it says. There are, in this order,
    #   I * S                            S = cdiv(T, POOL_ROWS): pool rows of a base tile; the last one scores the image
    #   B * cdiv(T, NORM_ROWS)           normalise rows of a tile, when its image has an expert
    #   B * cdiv(T, BLOCK_M) * columns   multiply a block of normalised rows, when they are there; in batch order
    # Grid: their sum, a number the host knows. A ticket waits for lower ones only, whose programs already run: nothing
    # depends on how many programs fit the GPU, nor on the order in which it starts them.
    # A counter that others wait for is raised with release after a barrier, so that it speaks for all warps (before 3.9
    # Triton puts none there), and polled with acquire. What is read behind it was written in this launch: by plain
    # loads or cp.async, never through a descriptor.
    pool_blocks = tl.maximum(tl.cdiv(tokens, POOL_ROWS), 1)
    norm_blocks = tl.cdiv(tokens, NORM_ROWS)
    token_blocks = tl.cdiv(tokens, BLOCK_M)
    arrived_ptr = counters_ptr + 2  # (I,) pooled row blocks of an image
    ids_ptr = arrived_ptr + images  # (I,) expert + 1
    ready_ptr = ids_ptr + images  # (B, token_blocks) normalised blocks of NORM_ROWS
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket < images * pool_blocks:
        image = ticket // pool_blocks
        block = ticket % pool_blocks
        i = image.to(tl.int64)
        tile = image if base_tile_ptr is None else tl.load(base_tile_ptr + image)
        partial_ptr = workspace_ptr + i * pool_blocks * D
        partial_pool(
            x_ptr + tile.to(tl.int64) * stride_xb, partial_ptr + block * D, block * POOL_ROWS, tokens, stride_xt, D,
            POOL_ROWS, BLOCK_D,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + image, 1, sem="acq_rel", scope="gpu") == pool_blocks - 1:
            pooled_ptr = workspace_ptr + images.to(tl.int64) * pool_blocks * D
            scratch_ptr = pooled_ptr + images.to(tl.int64) * D
            expert = score_image(
                partial_ptr, scratch_ptr + i * (H + E), router_norm_weight_ptr, router_norm_bias_ptr, hidden_weight_ptr,
                hidden_bias_ptr, router_weight_ptr, router_bias_ptr, pooled_ptr + i * D, scores_ptr + i * E,
                pool_blocks, tokens, router_eps, threshold, RULE, D, H, E, WIDTH, HIDDEN, BLOCK_E,
            )  # fmt: skip
            if forced_ptr is not None:
                expert = tl.load(forced_ptr + i).to(tl.int32)
            tl.debug_barrier()
            tl.atomic_xchg(ids_ptr + image, expert + 1, sem="release", scope="gpu")
            tl.debug_barrier()
            if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel", scope="gpu") == images - 1:
                sort_tiles(
                    ids_ptr,
                    image_of_tile_ptr,
                    expert_ptr,
                    order_ptr,
                    offsets_ptr,
                    batch,
                    E,
                    BLOCK_E,
                )
        return
    ticket -= images * pool_blocks
    if ticket < batch * norm_blocks:
        b = ticket // norm_blocks
        first = ticket % norm_blocks * NORM_ROWS
        image = b if image_of_tile_ptr is None else tl.load(image_of_tile_ptr + b)
        e = (_wait(ids_ptr + image, 1, TRAP) - 1).to(tl.int64)
        for start in range(first, tl.minimum(first + NORM_ROWS, tokens), ROWS):
            t = start + tl.arange(0, ROWS)
            valid = (t < tokens)[:, None]
            x = row_pointers(x_ptr, b, t, stride_xb, stride_xt, VECTOR)
            h = row_pointers(h_ptr, b, t, tokens.to(tl.int64) * D, D, VECTOR)
            normalise_rows(x, h, norm_weight_ptr, norm_bias_ptr, e, valid, norm_eps, D, LANES)
        tl.debug_barrier()
        tl.atomic_add(
            ready_ptr + b * token_blocks + first // BLOCK_M, 1, sem="release", scope="gpu"
        )
        return
    NUM_WEIGHTS: tl.constexpr = 3 if w2 is not None else 2 if w1 is not None else 1
    weight_blocks = tl.cdiv(columns, BLOCK_N)
    row, column = locate(
        ticket - batch * norm_blocks, batch * token_blocks, NUM_WEIGHTS * weight_blocks, GROUP
    )
    tile = row // token_blocks
    b = tile.to(tl.int64)
    first_m, first_n = row % token_blocks * BLOCK_M, column % weight_blocks * BLOCK_N
    _wait(ready_ptr + row, tl.cdiv(tl.minimum(tokens - first_m, BLOCK_M), NORM_ROWS), TRAP)
    image = tile if image_of_tile_ptr is None else tl.load(image_of_tile_ptr + tile)
    e = (_wait(ids_ptr + image, 1, TRAP) - 1).to(tl.int64)
    i = column // weight_blocks if NUM_WEIGHTS > 1 else 0
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        acc, h_ptr + b * tokens * D, pick(i, w0, w1, w2) + e * stride_we, m, n, tokens, columns, depth, D, stride_wn, 1,
        INPUT_PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    width = NUM_WEIGHTS * columns
    finish(
        acc, b, e, m, n, i * columns, pick(i, b0_ptr, b1_ptr, b2_ptr), None, None, y_ptr, None, tokens, columns, width,
        tokens.to(tl.int64) * width, width, ACTIVATION,
    )  # fmt: skip


def route_grouped_linear(
    x: Tensor,  # (B, T, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    image_of_tile: Tensor | None,  # (B,)
    base_tile: Tensor | None,  # (I,)
    expert: Tensor | None,  # (I,) forced
    router_norm_weight: Tensor,  # (D,)
    router_norm_bias: Tensor,
    router_hidden_weight: Tensor | None,  # (h, D)
    router_hidden_bias: Tensor | None,
    router_weight: Tensor,  # (E, D or h)
    router_bias: Tensor,  # (E,)
    router_eps: float,
    strategy: str,
    threshold: float,
    against: str,
    norm_weight: Tensor,  # (E, D)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, D)
    biases: list[Tensor],  # each (E, N_i), or empty
    activation: str,
) -> tuple[Tensor, ...]:  # y (B, T, N), scores (I, E), expert, order, offsets
    images = (image_of_tile, base_tile, expert)
    router = (
        router_norm_weight,
        router_norm_bias,
        router_hidden_weight,
        router_hidden_bias,
        router_weight,
        router_bias,
    )
    weights = [rows_dense(w) for w in weights]
    config = _configs.tickets(_configs.chip(x.device), x.dtype, x.shape[-1])
    if cu_seqlens is not None or config is None or alike(weights) < len(weights):
        rule = (router_eps, strategy, threshold, against)
        layer = (norm_weight, norm_bias, norm_eps, weights, biases, activation)
        separate = (route, grouped_layer_norm, grouped_linear)
        return three_ops(*separate, x, cu_seqlens, *images, *router, *rule, *layer)
    given = zip(GIVEN, (*images, *router, norm_weight, norm_bias), strict=True)
    args = {name: None if t is None else t.contiguous() for name, t in given}
    args |= {**named("w{}", weights), **named("b{}_ptr", [b.contiguous() for b in biases])}
    args |= {"stride_we": weights[0].stride(0), "stride_wn": weights[0].stride(1)}
    args |= {"router_eps": router_eps, "threshold": threshold, "norm_eps": norm_eps}
    args |= {"RULE": RULES.get(strategy, against), "ACTIVATION": activation}
    return _launch_tickets(aligned_rows(x), args, len(weights), config)


def _launch_tickets(
    x: Tensor, args: dict, num_weights: int, config: _configs.TicketConfig
) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    experts, columns, _ = args["w0"].shape
    images = batch if args["base_tile_ptr"] is None else args["base_tile_ptr"].shape[0]
    hidden = 0 if args["hidden_weight_ptr"] is None else args["hidden_weight_ptr"].shape[0]
    pools = images * triton.cdiv(tokens, config.pool.rows)
    row_blocks = batch * triton.cdiv(tokens, config.gemm.block_m)
    column_blocks = num_weights * triton.cdiv(columns, config.gemm.block_n)
    y = x.new_empty(batch, tokens, num_weights * columns)
    routed = routing_outputs(x, batch, images, experts)
    floats = pools * width + images * (width + hidden + experts)
    chip = _configs.chip(x.device)
    args |= {"x_ptr": x, "y_ptr": y, "h_ptr": x.new_empty(x.shape), **routed}
    args["workspace_ptr"] = x.new_empty(floats, dtype=torch.float32)
    args["counters_ptr"] = x.new_zeros(2 + 2 * images + row_blocks, dtype=torch.int32)
    args |= {"batch": batch, "images": images, "tokens": tokens, "columns": columns, "depth": width}
    args |= {"stride_xb": x.stride(0), "stride_xt": x.stride(1)}
    args |= {"D": width, "H": hidden, "E": experts, **powers_of_two(width, hidden, experts)}
    args |= {"INPUT_PRECISION": _configs.gemm_precision(chip, x.dtype)}
    args |= {"EVEN_K": width % config.gemm.block_k == 0, "TRAP": TRAPS[chip.arch > 0]}
    grid = pools + batch * triton.cdiv(tokens, config.norm_rows) + row_blocks * column_blocks
    _launch.launch(_route_grouped_linear_kernel, (grid,), args | config.constants, config)
    return y, *routed.values()
