"""Gradients of route in three launches, two where x needs none: images, parameters, features. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._math import activate, activate_grad
from ._route import GROUP, images_of, linear, load_vector, normalise, product, sum_rows, total
from ._tiles import Rows, locate_rows, rows_before, rows_of_tile

LINES: tl.constexpr = tl.constexpr(4)  # rows of a weight side by side


@triton.jit
def _linear_transposed(a_ptr, weight_ptr, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """sum_n a[n] weight[n, k], zeros from K on."""
    k = tl.arange(0, WIDTH)
    acc = tl.zeros((LINES, WIDTH), tl.float32)
    for n0 in range(0, N, LINES):
        n = n0 + tl.arange(0, LINES)
        a = tl.load(a_ptr + n, mask=n < N, other=0.0)
        mask = (n[:, None] < N) & (k[None, :] < K)
        w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = tl.fma(w, tl.broadcast_to(a[:, None], (LINES, WIDTH)), acc)
    return sum_rows(acc)


@triton.jit(do_not_specialize=["tokens"])
def _route_image_backward_kernel(
    dscores_ptr,  # (I, E) float32
    dpooled_ptr,  # (I, D) float32
    scores_ptr,  # (I, E) float32
    pooled_ptr,  # (I, D) float32
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    hidden_weight_ptr,  # (H, D) or None
    hidden_bias_ptr,  # (H,) or None
    weight_ptr,  # (E, H or D)
    image_ptr,  # (I, 4 D + 2 H + E) float32: dp / T, dh k, dh, h; g, dz; dl
    base_tile_ptr,  # (I,) or None; where all tiles have T tokens, None
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    tokens,
    eps,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # dl = s (ds - <ds, s>);  z = V h + c, g = gelu(z), dz = (W^T dl) gelu'(z), dh = V^T dz     or     dh = W^T dl
    # u = dh gamma,  dp = rstd (u - mean u - k mean(u k)) + dpooled     with h = k gamma + beta, k = (p - mean p) rstd
    #
    # One program an image. It writes what the sums over images need: their terms, one row an image.
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(0) if base_tile_ptr is None else tl.load(base_tile_ptr + i)
    _, rows = rows_of_tile(tile, tokens, cu_seqlens_ptr)
    image_ptr += i * (4 * D + 2 * H + E)
    g_ptr = image_ptr + 4 * D
    dz_ptr = g_ptr + H
    dl_ptr = dz_ptr + H
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, BLOCK_E)
    s = load_vector(scores_ptr + i * E, E, BLOCK_E)
    ds = load_vector(dscores_ptr + i * E, E, BLOCK_E)
    tl.store(dl_ptr + e, s * (ds - total(product(s, ds))), mask=e < E)
    k, rstd = normalise(load_vector(pooled_ptr + i * D, D, WIDTH), eps, D, WIDTH)
    gamma = load_vector(norm_weight_ptr, D, WIDTH)
    h = tl.fma(k, gamma, load_vector(norm_bias_ptr, D, WIDTH))
    tl.store(image_ptr + 3 * D + d, h, mask=d < D)
    tl.debug_barrier()  # dl is read by every warp
    if hidden_weight_ptr is not None:
        j = tl.arange(0, HIDDEN)
        linear(h, hidden_weight_ptr, hidden_bias_ptr, dz_ptr, H, D, WIDTH)
        z = load_vector(dz_ptr, H, HIDDEN)
        dz = _linear_transposed(dl_ptr, weight_ptr, E, H, HIDDEN) * activate_grad(z, "gelu")
        tl.store(g_ptr + j, activate(z, "gelu"), mask=j < H)
        tl.debug_barrier()  # z has been read by every warp: dz takes its place
        tl.store(dz_ptr + j, dz, mask=j < H)
        tl.debug_barrier()
        dh = _linear_transposed(dz_ptr, hidden_weight_ptr, H, D, WIDTH)
    else:
        dh = _linear_transposed(dl_ptr, weight_ptr, E, D, WIDTH)
    u = product(dh, gamma)
    dp = rstd * (u - total(u) / D - k * (total(product(u, k)) / D))
    dp += load_vector(dpooled_ptr + i * D, D, WIDTH)
    count = tl.broadcast_to(rows.to(tl.float32), (WIDTH,))
    tl.store(image_ptr + d, tl.div_rn(dp, count), mask=d < D)
    tl.store(image_ptr + D + d, dh * k, mask=d < D)
    tl.store(image_ptr + 2 * D + d, dh, mask=d < D)


@triton.jit
def _sum_of_products(
    a_ptr,  # (I, N), rows `stride` apart
    v_ptr,  # (I, K), likewise
    out_ptr,  # (N, K)
    bias_ptr,  # (N,)
    block,
    images,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, k] = sum_i a[i, n] v[i, k] and bias[n] = sum_i a[i, n], in the order of the images."""
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = block // K_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for i0 in range(0, images, GROUP):
        part = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # a sum of sums errs less than one long sum
        part_of_bias = tl.zeros((BLOCK_N,), tl.float32)
        left = tl.full((1,), images, tl.int32) - i0
        for i in tl.static_range(GROUP):
            a = tl.load(a_ptr + i * stride + n, mask=(n < N) & (i < left), other=0.0)
            v = tl.load(v_ptr + i * stride + k, mask=(k < K) & (i < left), other=0.0)
            part += a[:, None] * v[None, :]
            part_of_bias += a
        a_ptr += GROUP * stride
        v_ptr += GROUP * stride
        acc += part
        bias += part_of_bias
    mask = (n[:, None] < N) & (k[None, :] < K)
    tl.store(out_ptr + n[:, None] * K + k[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    if block % K_BLOCKS == 0:
        tl.store(bias_ptr + n, bias.to(bias_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["images"])
def _route_parameters_backward_kernel(
    image_ptr,  # (I, 4 D + 2 H + E) float32: what _route_image_backward_kernel wrote
    dnorm_weight_ptr,  # (D,)
    dnorm_bias_ptr,  # (D,)
    dhidden_weight_ptr,  # (H, D) or None
    dhidden_bias_ptr,  # (H,) or None
    dweight_ptr,  # (E, H or D)
    dbias_ptr,  # (E,)
    images,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dW = sum_i dl[i] g[i]^T,  db = sum_i dl[i];  dV = sum_i dz[i] h[i]^T,  dc = sum_i dz[i];
    # dgamma = sum_i dh[i] k[i],  dbeta = sum_i dh[i]     with i in [0, I), and h for g where there is no hidden layer
    #
    # One program computes BLOCK_N x BLOCK_K numbers of dW or dV, or BLOCK_K of dgamma and dbeta.
    # Grid: the blocks of dgamma and dbeta, then those of dW, then those of dV.
    stride: tl.constexpr = 4 * D + 2 * H + E
    WIDTH: tl.constexpr = H if H > 0 else D
    NORM_BLOCKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    LAST_BLOCKS: tl.constexpr = ((E + BLOCK_N - 1) // BLOCK_N) * ((WIDTH + BLOCK_K - 1) // BLOCK_K)
    h_ptr = image_ptr + 3 * D
    g_ptr = image_ptr + (4 * D if H > 0 else 3 * D)
    dz_ptr = image_ptr + 4 * D + H
    dl_ptr = dz_ptr + H
    block = tl.program_id(0)
    if block < NORM_BLOCKS:
        d = block * BLOCK_K + tl.arange(0, BLOCK_K)
        dgamma = tl.zeros((BLOCK_K,), tl.float32)
        dbeta = tl.zeros((BLOCK_K,), tl.float32)
        for i0 in range(0, images, GROUP):
            i = i0 + tl.arange(0, GROUP)
            mask = (i[:, None] < images) & (d[None, :] < D)
            at = i[:, None].to(tl.int64) * stride + d[None, :]
            dgamma += sum_rows(tl.load(image_ptr + D + at, mask=mask, other=0.0))
            dbeta += sum_rows(tl.load(image_ptr + 2 * D + at, mask=mask, other=0.0))
        tl.store(dnorm_weight_ptr + d, dgamma.to(dnorm_weight_ptr.dtype.element_ty), mask=d < D)
        tl.store(dnorm_bias_ptr + d, dbeta.to(dnorm_bias_ptr.dtype.element_ty), mask=d < D)
    elif block < NORM_BLOCKS + LAST_BLOCKS:
        _sum_of_products(
            dl_ptr, g_ptr, dweight_ptr, dbias_ptr, block - NORM_BLOCKS, images, stride, E, WIDTH, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        if dhidden_weight_ptr is not None:
            _sum_of_products(
                dz_ptr, h_ptr, dhidden_weight_ptr, dhidden_bias_ptr, block - NORM_BLOCKS - LAST_BLOCKS, images, stride,
                H, D, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["images", "batch", "tokens"])
def _route_features_backward_kernel(
    image_ptr,  # (I, stride) float32, dp / T first
    base_tile_ptr,  # (I,) or None
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    dx_ptr,  # (B, T, D)
    images,
    batch,
    tokens,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # dx[b, t] = sum over i with base_tile[i] = b of dp[i] / T: one image's, or 0
    #
    # One program writes ROWS rows of one tile. Grid: B * cdiv(T, ROWS).
    tile, begin, count, first_row = locate_rows(
        tl.program_id(0), batch, tokens, None, cu_seqlens_ptr, ROWS
    )
    t = first_row + tl.arange(0, ROWS)
    before = rows_before(begin, tokens, cu_seqlens_ptr)
    first, last = images_of(tile, base_tile_ptr, images, BLOCK_I)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        value = tl.zeros((BLOCK_D,), tl.float32)
        row_ptr = image_ptr + first.to(tl.int64) * stride
        for i in range(first, last):
            owned = tile if base_tile_ptr is None else tl.load(base_tile_ptr + i)
            width = tl.where(owned == tile, D, 0)
            value += tl.load(row_ptr + d, mask=d < width, other=0.0)
            row_ptr += stride
        rows = tl.broadcast_to(value[None, :], (ROWS, BLOCK_D)).to(dx_ptr.dtype.element_ty)
        at = (before + t[:, None]) * D + d[None, :]
        tl.store(dx_ptr + at, rows, mask=(t[:, None] < count) & (d[None, :] < D))


def route_backward(
    dscores: Tensor,  # (I, E)
    dpooled: Tensor,  # (I, D)
    x: Tensor,  # (B, T, D), packed (R, D); so is dx
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
    tiles, width = Rows.of(x, cu_seqlens), x.shape[-1]
    (images, experts), hidden = scores.shape, 0 if hidden_weight is None else hidden_weight.shape[0]
    stride = 4 * width + 2 * hidden + experts
    work = x.new_empty(images, stride, dtype=torch.float32)
    config, sums = _configs.route_config(width), _configs.ROUTE_SUMS
    sizes = {"D": width, "H": hidden, "E": experts}
    params = {
        "norm_weight_ptr": norm_weight,
        "norm_bias_ptr": norm_bias,
        "hidden_weight_ptr": hidden_weight,
        "hidden_bias_ptr": hidden_bias,
        "weight_ptr": weight,
    }
    rows = {
        "dscores_ptr": dscores,
        "dpooled_ptr": dpooled,
        "scores_ptr": scores,
        "pooled_ptr": pooled,
    }
    args = {n: None if t is None else t.contiguous() for n, t in (rows | params).items()}
    base_tile = None if base_tile is None else base_tile.contiguous()
    args |= {"image_ptr": work, "eps": eps, "tokens": tiles.tokens, "cu_seqlens_ptr": cu_seqlens}
    args["base_tile_ptr"] = None if cu_seqlens is None else base_tile
    args |= sizes | powers_of_two(width, hidden, experts)
    _launch.launch(_route_image_backward_kernel, (images,), args, config)

    grads = {
        f"d{n}": None if t is None else x.new_empty(t.shape, dtype=t.dtype)
        for n, t in params.items()
    }
    grads["dbias_ptr"] = weight.new_empty(experts)
    args = {"image_ptr": work, **grads, "images": images, **sizes}
    args |= {"BLOCK_N": sums.block_n, "BLOCK_K": sums.block_k}
    columns = [triton.cdiv(n, sums.block_k) for n in (width, hidden or width)]
    grid = columns[0] * (1 + triton.cdiv(hidden, sums.block_n))
    grid += columns[1] * triton.cdiv(experts, sums.block_n)
    _launch.launch(_route_parameters_backward_kernel, (grid,), args, sums)

    dx = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    if needs_x:
        args = {"image_ptr": work, "base_tile_ptr": base_tile, "dx_ptr": dx, "images": images}
        args |= {**tiles.args, "stride": stride, "D": width}
        args |= {"ROWS": config.rows, "BLOCK_I": sums.block_i, "BLOCK_D": config.block_d}
        grid = tiles.num_blocks(config.rows)
        _launch.launch(_route_features_backward_kernel, (grid,), args, config)
    return [dx, *(x.new_empty(0) if g is None else g for g in grads.values())]


def powers_of_two(width: int, hidden: int, experts: int) -> dict[str, int]:
    """The block sizes that hold a whole vector."""
    sizes = {"WIDTH": width, "HIDDEN": max(hidden, 1), "BLOCK_E": experts}
    return {name: triton.next_power_of_2(size) for name, size in sizes.items()}
