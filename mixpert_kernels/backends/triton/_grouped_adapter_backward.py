"""The backward of grouped_adapter: what is its own, in hidden space; the rest are grouped_linear's launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _configs_adapter, _launch
from ._dx import linear_dx
from ._gemm import product, rows_dense
from ._math import activate, activate_grad
from ._reduce import backward_parts, sums_by_expert
from ._tiles import Rows, first_block, locate_rows, rows_before, rows_of_tile, strides
from .grouped_outer import grouped_outer


@triton.jit(do_not_specialize=["batch", "tokens"])
def _adapter_hidden_backward_kernel(
    dy_ptr,  # (B, T, D)
    x_ptr,  # (B, T, D)
    down_ptr,  # (E, H, D)
    down_bias_ptr,  # (E, H)
    up_ptr,  # (E, D, H)
    scale_ptr,  # (E,)
    hidden_ptr,  # (B, T, H), contiguous, as are dz and scaled
    dz_ptr,  # (B, T, H) or None
    scaled_ptr,  # (B, T, H) or None
    bias_ptr,  # (B, S, H) float32 or None
    inner_ptr,  # (B, S, K) float32 or None
    expert_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    width,
    stride_yb,
    stride_yt,
    stride_xb,
    stride_xt,
    stride_de,
    stride_dh,
    stride_ue,
    stride_ud,
    H: tl.constexpr,
    K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # u_k[b, t, h] = sum_n dy[b, t, n] * up[k, n, h]
    # inner[b, s, k] = sum over t in block s, h of hidden_k[b, t, h] * u_k[b, t, h]
    # and of the tile's own adapter e = expert[b]:
    # dz[b, t, h] = scale[e] * u_e[b, t, h] * (hidden[b, t, h] > 0)
    # scaled[b, t, h] = scale[e] * hidden[b, t, h]
    # bias[b, s, h] = sum over t in block s of dz[b, t, h]
    #
    # One program computes block s of a tile, BLOCK_M tokens, for one adapter: for every one of K, or, where K = 1, for
    # the tile's own. hidden_e was kept by the forward pass, the others' are computed here. Grid: B * cdiv(T, BLOCK_M) *
    # K, adapters fastest, so that one block of dy and x is read from L2 by all.
    block, k = tl.program_id(0) // K, tl.program_id(0) % K
    tile, begin, rows, first_m = locate_rows(block, batch, tokens, None, cu_seqlens_ptr, BLOCK_M)
    b = begin.to(tl.int64)
    e = tl.load(expert_ptr + tile)
    if K == 1:
        adapter = e.to(tl.int64)
        own = e == e
    else:
        adapter = k.to(tl.int64)
        own = k == e
    m, h = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    summed = width if cu_seqlens_ptr is None else tl.where(first_m < rows, width, 0)
    u = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    u = product(
        u, dy_ptr + b * stride_yb, up_ptr + adapter * stride_ue, m, h, rows, H, summed,
        stride_yt, 1, stride_ud, INPUT_PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    inside = (m[:, None] < rows) & (h[None, :] < H)
    place = rows_before(begin, tokens, cu_seqlens_ptr) * H + (m[:, None] * H + h[None, :])
    hidden = tl.load(hidden_ptr + place, mask=inside & own, other=0.0).to(tl.float32)
    if K > 1:
        z = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        z = product(
            z, x_ptr + b * stride_xb, down_ptr + adapter * stride_de, m, h, rows, H, tl.where(own, 0, summed),
            stride_xt, stride_dh, 1, INPUT_PRECISION, EVEN_K, BLOCK_K,
        )  # fmt: skip
        bias = tl.load(down_bias_ptr + adapter * H + h, mask=h < H, other=0.0).to(tl.float32)
        z = activate(z + bias[None, :], "relu").to(hidden_ptr.dtype.element_ty).to(tl.float32)
        hidden = tl.where(own, hidden, z)
    if inner_ptr is not None:
        inner = tl.sum(tl.sum(tl.where(inside, hidden * u, 0.0), 1), 0)
        tl.store(inner_ptr + block.to(tl.int64) * K + k, inner)
    scale = tl.load(scale_ptr + e).to(tl.float32)
    if scaled_ptr is not None:
        scaled = (hidden * scale).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + place, scaled, mask=inside & own)
    dz = u * scale * activate_grad(hidden, "relu")
    if dz_ptr is not None:
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside & own)
    if bias_ptr is not None:
        dbias = tl.sum(tl.where(inside, dz, 0.0), 0)
        tl.store(bias_ptr + block.to(tl.int64) * H + h, dbias, mask=(h < H) & own)


@triton.jit
def _adapter_inner_kernel(
    inner_ptr,  # (B, S, K) float32, of packed rows (blocks, K)
    column_ptr,  # (B, C, D) float32, of packed rows (chunks, D)
    up_bias_ptr,  # (E, D)
    scale_ptr,  # (E,)
    dprobabilities_ptr,  # (B, K) float32 or None
    chosen_ptr,  # (B,) float32 or None
    expert_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # <dy[b], Adapter_k(x[b])> / scale[k] = sum_s inner[b, s, k] + sum_c sum_n column[b, c, n] * up_bias[k, n]
    # dprobabilities[b, k] = scale[k] * that; chosen[b] = that of k = expert[b]
    #
    # s are the tile's blocks of BLOCK tokens, c its chunks of CHUNK, whose column sums of dy these are. One program
    # computes one k of a tile, in an order that is the tile's own. Grid: B * K.
    tile, k = tl.program_id(0) // K, tl.program_id(0) % K
    e = tl.load(expert_ptr + tile)
    adapter = e if K == 1 else k
    begin, rows = rows_of_tile(tile, tokens, cu_seqlens_ptr)
    blocks, chunks = tl.cdiv(rows, BLOCK), tl.cdiv(rows, CHUNK)
    if cu_seqlens_ptr is None:
        first, first_chunk = tile * blocks, tile * chunks
    else:
        first, first_chunk = first_block(tile, begin, BLOCK), first_block(tile, begin, CHUNK)
    products = tl.zeros((ROWS,), tl.float32)
    for start in range(0, blocks, ROWS):
        s = start + tl.arange(0, ROWS)
        inner_ptrs = inner_ptr + (first + s).to(tl.int64) * K + k
        products += tl.load(inner_ptrs, mask=s < blocks, other=0.0)
    biases = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, D, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for c in range(0, chunks):
            at = (first_chunk + c).to(tl.int64) * D
            total += tl.load(column_ptr + at + n, mask=n < D, other=0.0)
        up_bias = tl.load(up_bias_ptr + adapter.to(tl.int64) * D + n, mask=n < D, other=0.0)
        biases += total * up_bias.to(tl.float32)
    inner = tl.sum(products, 0) + tl.sum(biases, 0)
    if chosen_ptr is not None:
        tl.store(chosen_ptr + tile, inner, mask=adapter == e)
    if dprobabilities_ptr is not None:
        scale = tl.load(scale_ptr + adapter).to(tl.float32)
        tl.store(dprobabilities_ptr + tl.program_id(0), inner * scale)


def hidden_backward(
    dy, x, down, down_bias, up, scale, hidden, expert, cu_seqlens, adapters, needs
) -> tuple[Tensor | None, ...]:
    """dz and scale * hidden (B, T, H), the parts of ddown_bias (B, S, H), and of the inner products (B, S, adapters).

    ``adapters`` is E, or 1 for each tile's own alone. ``needs`` tells which of the four results are needed.
    """
    rows, chip = Rows.of(dy, cu_seqlens), _configs.chip(dy.device)
    hidden, width = hidden.contiguous(), dy.shape[-1]
    row = _configs_adapter.adapter(chip, dy.dtype, hidden.shape[-1])
    blocks, (*_, depth) = rows.blocks(row.block_m), hidden.shape
    shapes = (hidden.shape, hidden.shape, (*blocks, depth), (*blocks, adapters))
    dtypes = (dy.dtype, dy.dtype, torch.float32, torch.float32)
    results = [
        dy.new_empty(shape, dtype=dtype) if needed else None
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    ]
    names = ("dz_ptr", "scaled_ptr", "bias_ptr", "inner_ptr")
    args = {
        "dy_ptr": dy,
        "x_ptr": x,
        "down_ptr": down,
        "down_bias_ptr": down_bias,
        "up_ptr": up,
        "scale_ptr": scale,
        "hidden_ptr": hidden,
        **dict(zip(names, results, strict=True)),
        "expert_ptr": expert,
        **rows.args,
        "width": width,
        **strides("stride_y{}", dy),
        **strides("stride_x{}", x),
        "stride_de": down.stride(0),
        "stride_dh": down.stride(1),
        "stride_ue": up.stride(0),
        "stride_ud": up.stride(1),
        "H": depth,
        "K": adapters,
        "INPUT_PRECISION": _configs.gemm_precision(chip, dy.dtype),
        "EVEN_K": width % row.block_k == 0,
        "BLOCK_M": row.block_m,
        "BLOCK_H": _configs_adapter.padded(depth),
        "BLOCK_K": row.block_k,
    }
    grid = (rows.num_blocks(row.block_m) * adapters,)
    _launch.launch(_adapter_hidden_backward_kernel, grid, args, row)
    return tuple(results)


def inner_products(
    parts, columns, up_bias, scale, expert, rows, block, needs_scale, needs_probabilities
) -> tuple[Tensor | None, Tensor | None]:
    """dprobabilities (B, E), and <dy[b], Adapter_e(x[b])> / scale[e] (B, 1, 1) of each tile's own adapter."""
    config, adapters = _configs_adapter.INNER, parts.shape[-1]
    dprobabilities = parts.new_empty(rows.batch, adapters) if needs_probabilities else None
    chosen = parts.new_empty(rows.batch, 1, 1) if needs_scale else None
    args = {
        "inner_ptr": parts,
        "column_ptr": columns,
        "up_bias_ptr": up_bias,
        "scale_ptr": scale,
        "dprobabilities_ptr": dprobabilities,
        "chosen_ptr": chosen,
        "expert_ptr": expert,
        "cu_seqlens_ptr": rows.cu_seqlens,
        "tokens": rows.tokens,
        "D": columns.shape[-1],
        "K": adapters,
        "BLOCK": block,
        "CHUNK": _configs.ACTIVATION_BACKWARD.chunk,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }
    _launch.launch(_adapter_inner_kernel, (rows.batch * adapters,), args, config)
    return dprobabilities, chosen


def grouped_adapter_backward(
    dy: Tensor,  # (B, T, D), packed (R, D); x and hidden likewise
    x: Tensor,  # (B, T, D)
    down: Tensor,  # (E, H, D)
    down_bias: Tensor,  # (E, H)
    up: Tensor,  # (E, D, H)
    up_bias: Tensor,  # (E, D)
    scale: Tensor,  # (E,)
    hidden: Tensor,  # (B, T, H)
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    needs: list[bool],  # of x, down, down_bias, up, up_bias, scale, probabilities
) -> list[Tensor]:  # in that order, empty where not needed
    """Nine launches where all is needed, and one multiplication of (E, D) numbers by scale."""
    needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, *needs_inner = needs
    dy, x, down, up = (rows_dense(t) for t in (dy, x, down, up))
    down_bias, up_bias, scale = (t.contiguous() for t in (down_bias, up_bias, scale))
    experts, depth, width = down.shape
    rows, packed = Rows.of(dy, cu_seqlens), {"cu_seqlens": cu_seqlens}
    grads = [dy.new_empty(0) for _ in needs]
    columns = None
    if needs_up_bias or any(needs_inner):
        _, columns = backward_parts(dy, None, None, expert, "none", True, False, **packed)
    if needs_up_bias:
        by_expert = (order, offsets, experts, torch.float32)
        (dup_bias,) = sums_by_expert(columns, [width], *by_expert, **packed)
        grads[4] = (dup_bias * scale[:, None].float()).to(up_bias.dtype)
    wanted = (needs_x or needs_down, needs_up, needs_down_bias, any(needs_inner))
    if not any(wanted):
        return grads
    dz, scaled, bias_parts, inner_parts = hidden_backward(
        dy, x, down, down_bias, up, scale, hidden, expert, cu_seqlens,
        experts if needs_inner[1] else 1, wanted,
    )  # fmt: skip
    by_expert = (order, offsets, experts)
    block = _configs_adapter.adapter(_configs.chip(dy.device), dy.dtype, depth).block_m
    if needs_x:
        grads[0], _ = linear_dx(dz, [down], expert, order, **packed)
    if needs_down:
        (grads[1],) = grouped_outer(dz, x, [depth], *by_expert, down.dtype, **packed)
    if needs_down_bias:
        (grads[2],) = sums_by_expert(
            bias_parts, [depth], *by_expert, down_bias.dtype, chunk=block, **packed
        )
    if needs_up:
        (grads[3],) = grouped_outer(dy, scaled, [width], *by_expert, up.dtype, **packed)
    if any(needs_inner):
        dprobabilities, chosen = inner_products(
            inner_parts, columns, up_bias, scale, expert, rows, block, *needs_inner
        )
        if needs_inner[0]:
            (dscale,) = sums_by_expert(chosen, [1], *by_expert, scale.dtype)
            grads[5] = dscale.flatten()
        if needs_inner[1]:
            grads[6] = dprobabilities
    return grads
