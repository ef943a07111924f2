"""Device code of routing, shared by the launch that only routes and by the one that also computes a GEMM.

Every sum of floats has one order, written out here: rows one after the other, columns pairwise, and no product is left
for the compiler to contract. So scores are bitwise the same in both launches: for any number of warps, whatever layout
the compiler picks, however x is aligned.
"""

import triton
import triton.language as tl

from mixpert_kernels.backends.triton._math import activate

GROUP: tl.constexpr = tl.constexpr(8)  # rows added side by side
PARTS: tl.constexpr = tl.constexpr(4)  # partials added side by side: 8 spill at D = 1152 on sm_100


@triton.jit
def sum_columns(v):  # (M, N) -> (M,), N a power of two
    """Sum over the last dimension, pairwise: an addition of two has no order to choose."""
    for _ in tl.static_range(16):
        if v.shape[1] > 1:
            v = tl.sum(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)), axis=2)
    return tl.reshape(v, (v.shape[0],))


@triton.jit
def sum_rows(v):  # (M, N) -> (N,), M a power of two
    """Sum over the first dimension, pairwise."""
    for _ in tl.static_range(16):
        if v.shape[0] > 1:
            v = tl.sum(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1])), axis=1)
    return tl.reshape(v, (v.shape[1],))


@triton.jit
def total(v):  # (N,) -> scalar, N a power of two
    return tl.sum(sum_columns(tl.reshape(v, (1, v.shape[0]))), axis=0)


@triton.jit
def product(a, b):
    """a b, rounded before anything is added to it."""
    return tl.fma(a, b, tl.zeros(a.shape, tl.float32))


@triton.jit
def images_of(tile, base_tile_ptr, images, BLOCK: tl.constexpr):
    """The images whose base is a tile, among others: (first, last + 1). None if the first is the last."""
    first = tile
    last = tile + 1  # a tile is an image
    if base_tile_ptr is not None:
        first = images
        last = 0
        for i0 in range(0, images, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            mine = (tl.load(base_tile_ptr + i, mask=i < images, other=-1) == tile) & (i < images)
            first = tl.minimum(first, tl.min(tl.where(mine, i, images), axis=0))
            last = tl.maximum(last, tl.max(tl.where(mine, i + 1, 0), axis=0))
    return first, last


@triton.jit
def partial_pool(
    x_ptr,  # (T, D), the tile
    partial_ptr,  # (D,) float32
    first,
    tokens,
    stride_xt,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[d] = sum of x[t, d] over first <= t < min(first + ROWS, tokens)."""
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
        for r in tl.static_range(0, ROWS, GROUP):
            t = first + r + tl.arange(0, GROUP)
            mask = (t[:, None] < tokens) & (d[None, :] < D)
            at = t[:, None].to(tl.int64) * stride_xt + d[None, :]
            acc += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + d, sum_rows(acc), mask=d < D)


@triton.jit
def add_partials(
    partial_ptr, blocks, D: tl.constexpr, WIDTH: tl.constexpr
):  # (blocks, D) -> (WIDTH,)
    """Sum of the partials of an image's row blocks, zeros from D on."""
    d = tl.arange(0, WIDTH)
    acc = tl.zeros((PARTS, WIDTH), tl.float32)
    for s0 in range(0, blocks, PARTS):
        s = s0 + tl.arange(0, PARTS)
        mask = (s[:, None] < blocks) & (d[None, :] < D)
        acc += tl.load(partial_ptr + s[:, None] * D + d[None, :], mask=mask, other=0.0)
    return sum_rows(acc)


@triton.jit
def normalise(pooled, eps, D: tl.constexpr, WIDTH: tl.constexpr):  # (WIDTH,) -> (WIDTH,), scalar
    """(pooled - mean) rstd, zeros from D on; and rstd."""
    mean = tl.div_rn(total(pooled), tl.full((), D, tl.float32))
    centred = tl.where(tl.arange(0, WIDTH) < D, pooled - mean, 0.0)
    var = tl.div_rn(total(product(centred, centred)), tl.full((), D, tl.float32))
    rstd = tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(var + eps))
    return centred * rstd, rstd


@triton.jit
def load_vector(ptr, N: tl.constexpr, WIDTH: tl.constexpr):
    """(N,) as float32, zeros from N on."""
    n = tl.arange(0, WIDTH)
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def linear(
    v,  # (WIDTH,) float32, zeros from K on
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    out_ptr,  # (N,) float32
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_k weight[n, k] v[k] + bias[n]; readable by the whole program after the barrier at its end."""
    # A row is summed alone: how many are, side by side, is a matter of registers.
    WIDE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth > 16 or WIDTH > 2048
    LINES: tl.constexpr = 4 if WIDE or N <= 4 else 8
    k = tl.arange(0, WIDTH)
    for n0 in range(0, N, LINES):
        n = n0 + tl.arange(0, LINES)
        mask = (n[:, None] < N) & (k[None, :] < K)
        w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        z = sum_columns(product(w, tl.broadcast_to(v[None, :], (LINES, WIDTH))))
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, z + bias, mask=n < N)
    tl.debug_barrier()


@triton.jit
def score_image(
    partial_ptr,  # (blocks, D) float32
    scratch_ptr,  # (H + E,) float32
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    hidden_weight_ptr,  # (H, D) or None
    hidden_bias_ptr,  # (H,) or None
    weight_ptr,  # (E, H or D)
    bias_ptr,  # (E,)
    pooled_ptr,  # (D,) float32
    scores_ptr,  # (E,) float32
    blocks,
    tokens,
    eps,
    threshold,
    RULE: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,  # D, HIDDEN and BLOCK_E: powers of two from D, H and E on
    HIDDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write an image's pooled features and scores, and return its expert.

    The program must have acquired the partials of all its row blocks.
    """
    d = tl.arange(0, WIDTH)
    pooled = tl.div_rn(add_partials(partial_ptr, blocks, D, WIDTH), tokens.to(tl.float32))
    tl.store(pooled_ptr + d, pooled, mask=d < D)
    h, _ = normalise(pooled, eps, D, WIDTH)
    h = tl.fma(h, load_vector(norm_weight_ptr, D, WIDTH), load_vector(norm_bias_ptr, D, WIDTH))
    logits_ptr = scratch_ptr + H
    if hidden_weight_ptr is not None:
        linear(h, hidden_weight_ptr, hidden_bias_ptr, scratch_ptr, H, D, WIDTH)
        g = activate(load_vector(scratch_ptr, H, HIDDEN), "gelu")  # gelu(0) = 0 from H on
        linear(g, weight_ptr, bias_ptr, logits_ptr, E, H, HIDDEN)
    else:
        linear(h, weight_ptr, bias_ptr, logits_ptr, E, D, WIDTH)
    e = tl.arange(0, BLOCK_E)
    logits = tl.load(logits_ptr + e, mask=e < E, other=-float("inf"))
    power = tl.where(e < E, tl.exp(logits - tl.max(logits, axis=0)), 0.0)
    scores = tl.div_rn(power, tl.broadcast_to(total(power), (BLOCK_E,)))
    tl.store(scores_ptr + e, scores, mask=e < E)
    return decide(scores, threshold, RULE, E, BLOCK_E)


@triton.jit
def decide(scores, threshold, RULE: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert: the lowest index of the best score, 0 where the rule or a non-finite score says so.

    RULE: direct, threshold, runner_up, versatile; the last two are the references of a score difference.
    """
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    top = tl.max(tl.where(inside, scores, -float("inf")), axis=0)
    best = tl.min(tl.where(inside & (scores == top), e, BLOCK_E), axis=0)
    finite = tl.sum((inside & (tl.abs(scores) < float("inf"))).to(tl.int32), axis=0) == E
    wins = finite
    if RULE == "threshold":
        wins = finite & (top >= threshold)
    elif RULE == "runner_up":
        others = tl.where(inside & (e != best), scores, -float("inf"))
        wins = finite & (top - tl.max(others, axis=0) >= threshold)
    elif RULE == "versatile":
        versatile = tl.max(tl.where(e == 0, scores, -float("inf")), axis=0)
        wins = finite & (top - versatile >= threshold)
    return tl.where(wins, best, 0)


@triton.jit
def sort_tiles(
    ids_ptr,  # (I,) int32, expert + 1 of each image
    image_of_tile_ptr,  # (B,) or None
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    offsets_ptr,  # (E + 1,) int32
    batch,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the expert of each tile, the stable order of the tiles by expert, and where each expert's begin.

    One program does it, and must have acquired all of ids.
    """
    BLOCK_B: tl.constexpr = 2048 // BLOCK_E if BLOCK_E < 128 else 16
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        ids = _expert_of_tiles(ids_ptr, image_of_tile_ptr, b, batch)
        tl.store(expert_ptr + b, ids, mask=b < batch)
        count += tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    end = tl.cumsum(count, axis=0)
    tl.store(offsets_ptr + 1 + e, end, mask=e < E)
    tl.store(offsets_ptr, 0)
    start = end - count
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        ids = _expert_of_tiles(ids_ptr, image_of_tile_ptr, b, batch)
        mine = (ids[:, None] == e[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - 1
        position = tl.sum(mine * (start[None, :] + rank), axis=1)
        tl.store(order_ptr + position, b, mask=(b < batch) & (ids < E) & (ids >= 0))
        start += tl.sum(mine, axis=0)


@triton.jit
def _expert_of_tiles(ids_ptr, image_of_tile_ptr, b, batch):
    image = b
    if image_of_tile_ptr is not None:
        image = tl.load(image_of_tile_ptr + b, mask=b < batch, other=0)
    return tl.load(ids_ptr + image, mask=b < batch, other=0) - 1  # -1, no expert, from batch on
