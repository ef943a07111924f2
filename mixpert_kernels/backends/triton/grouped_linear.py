"""grouped_linear: all tiles, experts and weights of a call in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixpert_kernels.backends.reference.grouped_linear import stores_pre

from . import _configs, _launch
from ._backward import grouped_linear_backward
from ._gemm import (
    alike,
    describable,
    describe,
    finish,
    locate,
    named,
    pick,
    product,
    product_tma,
    rows_dense,
)
from ._tiles import (
    Rows,
    as_tiles,
    box_of,
    count_row_blocks,
    locate_rows,
    strides,
)

__all__ = ["grouped_linear", "grouped_linear_backward"]


@triton.jit(do_not_specialize=["batch", "tokens"])
def _grouped_linear_kernel(
    x,  # (B, T, K), pointer or, with TMA, descriptor; so are the weights
    w0,  # (E, N, K)
    w1,  # (E, N, K) or None
    w2,  # (E, N, K) or None
    b0_ptr,  # (E, N) or None, the bias of w0
    b1_ptr,
    b2_ptr,
    scale_ptr,  # (E, width) or None
    residual_ptr,  # (B, T, width) or None, laid out like y
    y_ptr,  # (B, T, width)
    pre_ptr,  # (B, T, width) or None, laid out like y
    expert_ptr,  # (B,) int32
    order_ptr,  # (B,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    batch,
    tokens,
    columns,
    depth,
    stride_xb,
    stride_xt,
    stride_we,
    stride_wn,
    stride_yb,
    stride_yt,
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
    # z[b, t, i * N + n] = sum_k x[b, t, k] * w_i[e, n, k] + bias_i[e, n]     with e = expert[b], i the weight
    # y[b, t, c] = scale[e, c] * act(z[b, t, c]) + residual[b, t, c]          with c in [0, width), width = weights * N
    #
    # A block is BLOCK_M tokens of one tile x BLOCK_N columns of one weight. There are B * cdiv(T, BLOCK_M) * weights *
    # cdiv(N, BLOCK_N), a number the host knows: no expert id ever leaves the device, and a captured graph replays for
    # any routing. A program computes the blocks pid, pid + programs, ...: one each, or the grid fills the chip once.
    # Tiles are visited expert by expert (order), so that programs that run together share one expert's weights in L2.
    NUM_WEIGHTS: tl.constexpr = 3 if w2 is not None else 2 if w1 is not None else 1
    weight_blocks = tl.cdiv(columns, BLOCK_N)
    row_blocks = count_row_blocks(batch, tokens, cu_seqlens_ptr, BLOCK_M)
    column_blocks = NUM_WEIGHTS * weight_blocks
    first = tl.program_id(0)
    last = row_blocks * column_blocks if PERSISTENT else first + 1
    for block in range(first, last, tl.num_programs(0) if PERSISTENT else 1):
        row, column = locate(block, row_blocks, column_blocks, GROUP)
        tile, begin, rows, first_m = locate_rows(
            row, batch, tokens, order_ptr, cu_seqlens_ptr, BLOCK_M
        )
        expert = tl.load(expert_ptr + tile)
        b, e = begin.to(tl.int64), expert.to(tl.int64)
        i = column // weight_blocks if NUM_WEIGHTS > 1 else 0
        first_n = column % weight_blocks * BLOCK_N
        far, near = box_of(begin, first_m, cu_seqlens_ptr)
        summed = depth if cu_seqlens_ptr is None else tl.where(first_m < rows, depth, 0)
        m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:  # a descriptor cannot be selected, so that each weight has a loop of its own
            for j in tl.static_range(NUM_WEIGHTS):
                if i == j:
                    acc = product_tma(
                        acc, x, w0 if j == 0 else w1 if j == 1 else w2, far, expert, near, first_n, 0, summed,
                        INPUT_PRECISION, False, BLOCK_K,
                    )  # fmt: skip
        else:
            acc = product(
                acc, x + b * stride_xb, pick(i, w0, w1, w2) + e * stride_we, m, n, rows, columns, summed,
                stride_xt, stride_wn, 1, INPUT_PRECISION, EVEN_K, BLOCK_K,
            )  # fmt: skip
        bias_ptr = pick(i, b0_ptr, b1_ptr, b2_ptr)
        finish(
            acc, b, e, m, n, i * columns, bias_ptr, scale_ptr, residual_ptr, y_ptr, pre_ptr,
            rows, columns, NUM_WEIGHTS * columns, stride_yb, stride_yt, ACTIVATION,
        )  # fmt: skip


def grouped_linear(
    x: Tensor,  # (B, T, K), packed (R, K); so is what follows it
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, N), pre-activation (B, T, N) or empty
    """One launch for up to three weights of one shape; a call with others takes one for each run of such weights."""
    x, weights = rows_dense(x), [rows_dense(w) for w in weights]
    width = sum(w.shape[1] for w in weights)
    y = x.new_empty(*x.shape[:-1], width)
    pre = torch.empty_like(y) if stores_pre(activation, scale, for_backward) else None
    residual = None if residual is None else residual.contiguous()
    column = 0
    while weights:
        count = alike(weights)
        columns = slice(column, column + count * weights[0].shape[1])
        _launch_side_by_side(
            x,
            weights[:count],
            [bias.contiguous() for bias in biases[:count]],
            (expert, order, cu_seqlens),
            activation,
            *(None if t is None else t[..., columns] for t in (residual, y, pre)),
            scale=None if scale is None else scale[:, columns].contiguous(),
        )
        weights, biases, column = weights[count:], biases[count:], columns.stop
    return y, x.new_empty(0) if pre is None else pre


def _launch_side_by_side(x, weights, biases, ids, activation, residual, y, pre, *, scale) -> None:
    expert, order, cu_seqlens = ids
    rows = Rows.of(x, cu_seqlens)
    columns, depth = weights[0].shape[1:]
    chip = _configs.chip(x.device)
    args = {
        **named("b{}_ptr", biases),
        "scale_ptr": scale,
        "residual_ptr": residual,
        "y_ptr": y,
        "pre_ptr": pre,
        "expert_ptr": expert,
        "order_ptr": order,
        **rows.args,
        "batch": rows.batch,
        "columns": columns,
        "depth": depth,
        **strides("stride_x{}", x),
        "stride_we": weights[0].stride(0),
        "stride_wn": weights[0].stride(1),
        **strides("stride_y{}", y),
        "ACTIVATION": activation,
        "INPUT_PRECISION": _configs.gemm_precision(chip, x.dtype),
    }

    def run(row: _configs.GemmConfig) -> None:
        column_blocks = len(weights) * triton.cdiv(columns, row.block_n)
        blocks = rows.num_blocks(row.block_m) * column_blocks
        operands = {"x": x, **named("w{}", weights)}
        if row.tma:
            operands["x"], sides = as_tiles(x), {"x": row.block_m}
            operands = {
                name: describe(t, (1, sides.get(name, row.block_n), row.block_k))
                for name, t in operands.items()
            }
        flags = {"EVEN_K": row.tma or depth % row.block_k == 0, **row.constants}
        grid = (row.programs(blocks, chip),)
        _launch.launch(_grouped_linear_kernel, grid, operands | args | flags, row)

    configs = _configs.gemm_rows(chip, x.dtype, lambda: describable(as_tiles(x), *weights))
    key = ("grouped_linear", columns, depth, x.dtype, chip)
    run(_configs.fastest(key, configs, run))
