"""grouped_outer: the gradients of the experts' weights, all of them in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _launch
from ._gemm import WEIGHTS, describable, describe, locate, rows_dense
from ._tiles import rows_of_tile, strides


@triton.jit
def place(block, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Where a block of columns lies in three tensors side by side, of which it never spans two.

    Returns (is it in the first, is it in the second, width of its tensor, columns before its tensor, first column
    within its tensor).
    """
    blocks0: tl.constexpr = (WIDTH0 + BLOCK - 1) // BLOCK
    blocks1: tl.constexpr = (WIDTH1 + BLOCK - 1) // BLOCK
    in0 = block < blocks0
    in1 = (block >= blocks0) & (block < blocks0 + blocks1)
    width = tl.where(in0, WIDTH0, tl.where(in1, WIDTH1, WIDTH2))
    before = tl.where(in0, 0, tl.where(in1, WIDTH0, WIDTH0 + WIDTH1))
    first_block = tl.where(in0, 0, tl.where(in1, blocks0, blocks0 + blocks1))
    return in0, in1, width, before, (block - first_block) * BLOCK


@triton.jit(do_not_specialize=["tokens"])
def _grouped_outer_kernel(
    z,  # (B, T, N), N = WIDTH0 + WIDTH1 + WIDTH2; pointer or, with TMA, descriptor, as is x
    x,  # (B, T, K)
    out0_ptr,  # (E, WIDTH0, K)
    out1_ptr,  # (E, WIDTH1, K)
    out2_ptr,  # (E, WIDTH2, K)
    order_ptr,  # (B,) int32
    offsets_ptr,  # (E + 1,) int32
    cu_seqlens_ptr,  # (B + 1,) int32, of packed rows (_tiles.py), or None
    tokens,
    stride_zb,
    stride_zt,
    stride_xb,
    stride_xt,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    # out_i[e, n, k] = sum over b in order[offsets[e] : offsets[e + 1]], t of z[b, t, before_i + n] * x[b, t, k]
    # with n in [0, WIDTH_i), before_i = sum of WIDTH_j, j < i
    #
    # One program computes BLOCK_N x BLOCK_K of one expert, all of its sum in a fixed order: no atomics, so an expert's
    # gradient is bit for bit what its own tiles alone give, and an expert without tiles stores zeros.
    # Grid: E * BLOCKS_N * cdiv(K, BLOCK_K), BLOCKS_N = sum of cdiv(WIDTH_i, BLOCK_N).
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    e = tl.program_id(0) // (BLOCKS_N * BLOCKS_K)
    block = tl.program_id(0) % (BLOCKS_N * BLOCKS_K)
    block_n, block_k = locate(block, BLOCKS_N, BLOCKS_K, GROUP)
    in0, in1, width, before, first_n = place(block_n, WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    first_k = block_k * BLOCK_K
    n, k, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    in_n, in_k = first_n + n < width, first_k + k < K

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # Two loops: in a single one over all tokens of an expert, addresses wait for `order` and nothing is prefetched.
    for i in range(tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)):
        b, rows = rows_of_tile(tl.load(order_ptr + i), tokens, cu_seqlens_ptr)
        for first_t in range(0, rows, BLOCK_T):
            if TMA:
                z_block = z.load([b, first_t, before + first_n]).reshape(BLOCK_T, BLOCK_N).T
                x_block = x.load([b, first_t, first_k]).reshape(BLOCK_T, BLOCK_K)
            else:
                # z is read transposed, not transposed after the load: else it is not copied asynchronously.
                far, row = b.to(tl.int64), tl.cast(first_t, tl.int64)
                z_ptrs = z + far * stride_zb + row * stride_zt + before + first_n
                x_ptrs = x + far * stride_xb + row * stride_xt + first_k
                z_ptrs = z_ptrs + t[None, :].to(tl.int64) * stride_zt + n[:, None]
                x_ptrs = x_ptrs + t[:, None].to(tl.int64) * stride_xt + k[None, :]
                in_t = first_t + t < rows
                z_block = tl.load(z_ptrs, mask=in_n[:, None] & in_t[None, :], other=0.0)
                x_block = tl.load(x_ptrs, mask=in_t[:, None] & in_k[None, :], other=0.0)
            acc = tl.dot(z_block, x_block, acc, input_precision=INPUT_PRECISION)

    out_ptr = tl.where(in0, out0_ptr, tl.where(in1, out1_ptr, out2_ptr))
    out_ptr += (e.to(tl.int64) * width + first_n) * K + first_k
    out_ptrs = out_ptr + n[:, None] * K + k[None, :]
    inside = in_n[:, None] & in_k[None, :]
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, acc.to(out0_ptr.dtype.element_ty), mask=inside)


def grouped_outer(
    dz: Tensor,  # (B, T, N), N = sum of widths; packed (R, N), and x likewise
    x: Tensor,  # (B, T, K)
    widths: list[int],
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    num_experts: int,
    dtype: torch.dtype,
    out: list[Tensor] | None = None,  # each (E, widths[i], K) float32
    accumulate: bool = False,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> list[Tensor]:  # each (E, widths[i], K)
    """dW_i[e] = sum over the tiles b of e of dz_i[b]^T x[b]; exact zeros for an expert without a tile.

    One launch for up to three weights. Sums are float32, over tiles in the order of ``order`` and tokens upwards.

    Args:
        dz: the gradients of all weights' products side by side.
        x: what the weights were multiplied with.
        widths: columns of ``dz`` that belong to each weight.
        order: the tiles expert by expert.
        offsets: where each expert begins in ``order``.
        num_experts: E.
        dtype: of the results, unless ``out`` is given.
        out: main gradients to write instead of new tensors; contiguous.
        accumulate: add to ``out`` instead of overwriting it: an expert without a tile keeps what it has.
    """
    dz, x = rows_dense(dz), rows_dense(x)
    if out is None:
        out = [x.new_empty(num_experts, width, x.shape[-1], dtype=dtype) for width in widths]
    assert all(o.is_contiguous() for o in out)
    for first in range(0, len(widths), WEIGHTS):
        columns = dz[..., sum(widths[:first]) :]
        ids = (order, offsets, cu_seqlens)
        _launch_run(columns, x, out[first : first + WEIGHTS], ids, accumulate)
    return out


def _launch_run(dz, x, out, ids, accumulate) -> None:
    order, offsets, cu_seqlens = ids
    num_experts, _, depth = out[0].shape
    widths = [o.shape[1] for o in out] + [0] * (WEIGHTS - len(out))
    chip = _configs.chip(x.device)
    args = {
        **{f"out{i}_ptr": out[min(i, len(out) - 1)] for i in range(WEIGHTS)},
        "order_ptr": order,
        "offsets_ptr": offsets,
        "cu_seqlens_ptr": cu_seqlens,
        "tokens": x.shape[-2],
        **strides("stride_z{}", dz),
        **strides("stride_x{}", x),
        **{f"WIDTH{i}": width for i, width in enumerate(widths)},
        "K": depth,
        "ACCUMULATE": accumulate,
        "INPUT_PRECISION": _configs.gemm_precision(chip, x.dtype),
    }

    def run(row: _configs.OuterConfig) -> None:
        blocks_n = sum(triton.cdiv(width, row.block_n) for width in widths)
        operands = {"z": dz, "x": x}
        if row.tma:
            operands["z"] = describe(dz, (1, row.block_t, row.block_n))
            operands["x"] = describe(x, (1, row.block_t, row.block_k))
        grid = (num_experts * blocks_n * triton.cdiv(depth, row.block_k),)
        constants = {"BLOCKS_N": blocks_n, **row.constants}
        _launch.launch(_grouped_outer_kernel, grid, operands | args | constants, row)

    # A box of packed rows would bring the next tile's rows into the sum: of them only pointers are masked.
    apart = cu_seqlens is None
    rows = _configs.outer_rows(chip, x.dtype, lambda: apart and describable(dz, x))
    key = ("grouped_outer", *widths, depth, x.dtype, chip)
    # What adds to its output cannot be run again and again to be timed.
    run(rows[0] if accumulate else _configs.fastest(key, rows, run))
