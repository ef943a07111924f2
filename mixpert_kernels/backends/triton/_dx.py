"""The gradient of grouped_linear with respect to its features, one launch for all weights of the call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._gemm import (
    alike,
    describable,
    describe,
    locate,
    named,
    pick,
    product,
    product_tma,
    rows_dense,
)
from ._math import activate, activate_grad
from ._tiles import (
    Rows,
    as_tiles,
    box_of,
    count_row_blocks,
    locate_rows,
    rows_before,
    strides,
)


@triton.jit(do_not_specialize=["batch", "tokens"])
def _linear_dx_kernel(
    dz,  # (B, T, weights * N), pointer or, with TMA, descriptor; so are the weights
    w0,  # (E, N, K)
    w1,  # (E, N, K) or None
    w2,  # (E, N, K) or None
    pre_ptr,  # (B, T, K) or None
    dx_ptr,  # (B, T, K)
    h_ptr,  # (B, T, K) or None
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    columns,
    depth,
    stride_zb,
    stride_zt,
    stride_we,
    stride_wn,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dx[b, t, k] = act'(pre[b, t, k]) * sum_i sum_n dz[b, t, i * N + n] * w_i[e, n, k]     with e = expert[b]
    # h[b, t, k] = act(pre[b, t, k])
    #
    # pre is what the features were before the activation of the layer below: its gradient ends here and its output is
    # computed again, so that neither is a pass of its own. Here the columns of a block are k, and the sum is over n.
    # A block is BLOCK_M tokens of one tile x BLOCK_N columns, visited as in grouped_linear. It adds the weights up one
    # after the other. Grid: B * cdiv(T, BLOCK_M) * cdiv(K, BLOCK_N), or, PERSISTENT, what fills the chip once.
    NUM_WEIGHTS: tl.constexpr = 3 if w2 is not None else 2 if w1 is not None else 1
    row_blocks = count_row_blocks(batch, tokens, cu_seqlens_ptr, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0)
    last = row_blocks * column_blocks if PERSISTENT else first + 1
    for block in range(first, last, tl.num_programs(0) if PERSISTENT else 1):
        row, column = locate(block, row_blocks, column_blocks, GROUP)
        tile, begin, count, first_m = locate_rows(
            row, batch, tokens, order_ptr, cu_seqlens_ptr, BLOCK_M
        )
        expert = tl.load(expert_ptr + tile)
        b, e = begin.to(tl.int64), expert.to(tl.int64)
        first_n = column * BLOCK_N
        far, near = box_of(begin, first_m, cu_seqlens_ptr)
        summed = depth if cu_seqlens_ptr is None else tl.where(first_m < count, depth, 0)
        m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:  # a descriptor cannot be selected, so that each weight has a loop of its own
            for i in tl.static_range(NUM_WEIGHTS):
                acc = product_tma(
                    acc, dz, w0 if i == 0 else w1 if i == 1 else w2, far, expert, near, first_n, i * depth, summed,
                    INPUT_PRECISION, True, BLOCK_K,
                )  # fmt: skip
        else:
            for i in range(NUM_WEIGHTS):
                acc = product(
                    acc, dz + b * stride_zb + i * depth, pick(i, w0, w1, w2) + e * stride_we, m, n, count, columns,
                    summed, stride_zt, 1, stride_wn, INPUT_PRECISION, EVEN_K, BLOCK_K,
                )  # fmt: skip
        rows = m[:, None]
        before = rows_before(begin, tokens, cu_seqlens_ptr) * columns
        if pre_ptr is None:
            inside = (rows < count) & (n[None, :] < columns)
            place = before + (rows * columns + n[None, :])
            tl.store(dx_ptr + place, acc.to(dx_ptr.dtype.element_ty), mask=inside)
        else:  # in halves, for the registers
            halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            for i in tl.static_range(2):
                half = first_n + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
                inside = (rows < count) & (half < columns)
                place = before + (rows * columns + half)
                pre = tl.load(pre_ptr + place, mask=inside, other=0.0).to(tl.float32)
                h = activate(pre, ACTIVATION)
                tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)
                dx = halves[i] * activate_grad(pre, ACTIVATION)
                tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def linear_dx(
    dz: Tensor,  # (B, T, sum N_i), packed (R, sum N_i); pre, dx and h likewise
    weights: list[Tensor],  # each (E, N_i, K)
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    activation: str = "none",
    pre: Tensor | None = None,  # (B, T, K)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor | None]:  # dx (B, T, K), h (B, T, K)
    """Return ``dx = (sum_i dz_i @ weights[i][e]) * act'(pre)`` and ``h = act(pre)``; without ``pre``, dz @ W and None.

    One launch for up to three weights of one shape and layout; others are concatenated first.
    """
    dz, weights = rows_dense(dz), [rows_dense(w) for w in weights]
    if alike(weights) < len(weights):
        weights = [torch.cat(weights, 1)]
    rows, (_, depth, columns) = Rows.of(dz, cu_seqlens), weights[0].shape
    dx = dz.new_empty(*dz.shape[:-1], columns)
    h = None if pre is None else torch.empty_like(dx)
    chip = _configs.chip(dz.device)
    args = {
        "pre_ptr": None if pre is None else pre.contiguous(),
        "dx_ptr": dx,
        "h_ptr": h,
        "expert_ptr": expert,
        "order_ptr": order,
        **rows.args,
        "batch": rows.batch,
        "columns": columns,
        "depth": depth,
        **strides("stride_z{}", dz),
        "stride_we": weights[0].stride(0),
        "stride_wn": weights[0].stride(1),
        "ACTIVATION": activation,
        "INPUT_PRECISION": _configs.gemm_precision(chip, dz.dtype),
    }

    def run(row: _configs.GemmConfig) -> None:
        operands = {"dz": dz, **named("w{}", weights)}
        if row.tma:
            operands["dz"] = as_tiles(dz)
            boxes = {"dz": (1, row.block_m, row.block_k)}
            operands = {
                name: describe(t, boxes.get(name, (1, row.block_k, row.block_n)))
                for name, t in operands.items()
            }
        flags = {"EVEN_K": row.tma or depth % row.block_k == 0, **row.constants}
        blocks = rows.num_blocks(row.block_m) * triton.cdiv(columns, row.block_n)
        grid = (row.programs(blocks, chip),)
        _launch.launch(_linear_dx_kernel, grid, operands | args | flags, row)

    # A box of dz must not reach into the columns of the next weight: 64 is a multiple of every BLOCK_K.
    apart = len(weights) == 1 or depth % 64 == 0
    configs = _configs.gemm_rows(
        chip, dz.dtype, lambda: apart and describable(as_tiles(dz), *weights)
    )
    run(_configs.fastest(("linear_dx", columns, depth, dz.dtype, chip), configs, run))
    return dx, h
