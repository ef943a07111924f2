"""grouped_adapter: both products of each tile's adapter in one launch; the hidden numbers between them stay on chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _configs_adapter, _launch
from ._gemm import product, rows_dense
from ._grouped_adapter_backward import grouped_adapter_backward as grouped_adapter_backward
from ._math import activate
from ._tiles import Rows, locate_rows, rows_before, strides


@triton.jit(do_not_specialize=["batch", "tokens"])
def _grouped_adapter_kernel(
    x_ptr,  # (B, T, D)
    down_ptr,  # (E, H, D)
    down_bias_ptr,  # (E, H)
    up_ptr,  # (E, D, H)
    up_bias_ptr,  # (E, D)
    scale_ptr,  # (E,)
    residual_ptr,  # (B, T, D) or None, contiguous, as are y and hidden
    y_ptr,  # (B, T, D)
    hidden_ptr,  # (B, T, H) or None
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    width,
    stride_xb,
    stride_xt,
    stride_de,
    stride_dh,
    stride_ue,
    stride_ud,
    H: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # hidden[b, t, h] = relu(sum_k x[b, t, k] * down[e, h, k] + down_bias[e, h])     with e = expert[b]
    # o[b, t, n] = scale[e] * (sum_h hidden[b, t, h] * up[e, n, h] + up_bias[e, n])
    # y[b, t, n] = o[b, t, n] + residual[b, t, n], and where o is 0 the residual itself, for -0 + 0 is 0
    #
    # One program computes the hidden numbers of BLOCK_M tokens of one tile, which stay on chip as the left operand of
    # the second product, and from them SPAN columns of y. Programs of the same tokens each compute the hidden numbers
    # again: that is as many products as D columns take, and waiting for another program would take longer.
    # Grid: B * cdiv(T, BLOCK_M) * cdiv(D, SPAN), columns fastest, so that one block of x is read from L2 by all.
    spans = tl.cdiv(width, SPAN)
    block, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    tile, begin, rows, first_m = locate_rows(
        block, batch, tokens, order_ptr, cu_seqlens_ptr, BLOCK_M
    )
    e = tl.load(expert_ptr + tile).to(tl.int64)
    m, h = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    summed = width if cu_seqlens_ptr is None else tl.where(first_m < rows, width, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    acc = product(
        acc, x_ptr + begin.to(tl.int64) * stride_xb, down_ptr + e * stride_de, m, h, rows, H, summed,
        stride_xt, stride_dh, 1, INPUT_PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    bias = tl.load(down_bias_ptr + e * H + h, mask=h < H, other=0.0).to(tl.float32)
    hidden = activate(acc + bias[None, :], "relu")
    # Past H there are zeros, even beside features that are not finite.
    hidden = tl.where(h[None, :] < H, hidden, 0.0).to(x_ptr.dtype.element_ty)
    before = rows_before(begin, tokens, cu_seqlens_ptr)
    if hidden_ptr is not None:
        kept = (m[:, None] < rows) & (h[None, :] < H) & (span == 0)
        tl.store(hidden_ptr + before * H + (m[:, None] * H + h[None, :]), hidden, mask=kept)

    scale = tl.load(scale_ptr + e).to(tl.float32)
    first_n = span * SPAN
    last_n = tl.minimum(first_n + SPAN, width if cu_seqlens_ptr is None else summed)
    for start in range(first_n, last_n, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        up_ptrs = up_ptr + e * stride_ue + (n[None, :] * stride_ud + h[:, None])
        up = tl.load(up_ptrs, mask=(h[:, None] < H) & (n[None, :] < width), other=0.0)
        o = tl.dot(hidden, up.to(hidden.dtype), input_precision=INPUT_PRECISION)
        up_bias = tl.load(up_bias_ptr + e * width + n, mask=n < width, other=0.0)
        o = (o + up_bias[None, :].to(tl.float32)) * scale
        place = before * width + (m[:, None] * width + n[None, :])
        inside = (m[:, None] < rows) & (n[None, :] < width)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
            o = tl.where(o == 0.0, residual, o + residual)
        tl.store(y_ptr + place, o.to(y_ptr.dtype.element_ty), mask=inside)


def grouped_adapter(
    x: Tensor,  # (B, T, D), packed (R, D); residual, y and hidden likewise
    down: Tensor,  # (E, H, D)
    down_bias: Tensor,  # (E, H)
    up: Tensor,  # (E, D, H)
    up_bias: Tensor,  # (E, D)
    scale: Tensor,  # (E,)
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    residual: Tensor | None,  # (B, T, D)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, D), hidden (B, T, H) or empty
    """One launch. The hidden numbers go to memory for backward alone: H numbers a token, beside D of the output."""
    x, down, up = (rows_dense(t) for t in (x, down, up))
    width, hidden = up.shape[1:]
    rows, chip = Rows.of(x, cu_seqlens), _configs.chip(x.device)
    row = _configs_adapter.adapter(chip, x.dtype, hidden)
    y = x.new_empty(x.shape)
    kept = x.new_empty((*x.shape[:-1], hidden) if for_backward else 0)
    args = {
        "x_ptr": x,
        "down_ptr": down,
        "down_bias_ptr": down_bias.contiguous(),
        "up_ptr": up,
        "up_bias_ptr": up_bias.contiguous(),
        "scale_ptr": scale.contiguous(),
        "residual_ptr": None if residual is None else residual.contiguous(),
        "y_ptr": y,
        "hidden_ptr": kept if for_backward else None,
        "expert_ptr": expert,
        "order_ptr": order,
        **rows.args,
        "width": width,
        **strides("stride_x{}", x),
        "stride_de": down.stride(0),
        "stride_dh": down.stride(1),
        "stride_ue": up.stride(0),
        "stride_ud": up.stride(1),
        "H": hidden,
        "INPUT_PRECISION": _configs.gemm_precision(chip, x.dtype),
        "EVEN_K": width % row.block_k == 0,
        "SPAN": row.span,
        "BLOCK_M": row.block_m,
        "BLOCK_H": _configs_adapter.padded(hidden),
        "BLOCK_N": row.block_n,
        "BLOCK_K": row.block_k,
    }
    grid = (rows.num_blocks(row.block_m) * triton.cdiv(width, row.span),)
    _launch.launch(_grouped_adapter_kernel, grid, args, row)
    return y, kept
