"""Device code of the grouped GEMMs: which block a program computes, the main loop on its two load paths, the epilogue.

Every kernel that multiplies by the weight of a tile's expert calls these, with the same config: so a fused form gives
bit for bit what separate launches give.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._math import activate

# The weights that one launch reads: query, key and value.
WEIGHTS = 3


def rows_dense(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def named(pattern: str, tensors: list[Tensor]) -> dict[str, Tensor | None]:
    """The kernel's arguments that are given once for each weight, None for weights that there are not."""
    return {pattern.format(i): t for i, t in enumerate([*tensors, *[None] * WEIGHTS][:WEIGHTS])}


def alike(weights: list[Tensor]) -> int:
    """How many of the weights, from the first on, one launch can read: of one shape, layout and dtype."""
    first = weights[0]
    count = 1
    for w in weights[1:WEIGHTS]:
        if (w.shape, w.stride(), w.dtype) != (first.shape, first.stride(), first.dtype):
            break
        count += 1
    return count


def describable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can describe these tensors (with 3 dimensions and one dtype)."""
    return all(
        t.dtype == tensors[0].dtype
        and t.data_ptr() % 16 == 0
        and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def describe(tensor: Tensor | None, box: tuple[int, int, int]) -> TensorDescriptor | None:
    """A descriptor, made on the host, that reads boxes of this shape and 0 outside the tensor."""
    if tensor is None:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))


@triton.jit
def locate(block, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Number of a block -> (row block, column block).

    GROUP row blocks are visited with all column blocks before the next GROUP, rows first: blocks that run together
    share GROUP blocks of features and few of weights, and both stay in L2.
    """
    first = block // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = block % (GROUP * column_blocks)
    return first + within % height, within // height


@triton.jit
def pick(i, first, second, third):
    """The i-th of up to three pointers (or None, if there are none)."""
    chosen = first
    if second is not None:
        chosen = second if i == 1 else chosen
    if third is not None:
        chosen = third if i == 2 else chosen
    return chosen


@triton.jit
def product(
    acc,  # (BLOCK_M, BLOCK_N) float32
    x_ptr,  # of the tile: element [t, k] at t * stride_xt + k
    w_ptr,  # of the expert: element [n, k] at n * stride_wn + k * stride_wk
    m,  # (BLOCK_M,) tokens
    n,  # (BLOCK_N,) columns
    tokens,
    columns,
    depth,
    stride_xt,
    stride_wn,
    stride_wk,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides depth
    BLOCK_K: tl.constexpr,
):
    """acc[m, n] + sum_k x[m, k] w[n, k], for k in [0, depth), in steps of BLOCK_K from 0 up.

    Rows past ``tokens`` and columns past ``columns`` are read as 0. 64-bit offsets: a row may lie anywhere.
    """
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * stride_xt + k[None, :]
    w_ptrs = w_ptr + n[None, :].to(tl.int64) * stride_wn + k[:, None].to(tl.int64) * stride_wk
    in_rows = m[:, None] < tokens
    in_columns = n[None, :] < columns
    w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=in_rows, other=0.0)
            w = tl.load(w_ptrs, mask=in_columns, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=in_rows & (k[None, :] < depth - start), other=0.0)
            w = tl.load(w_ptrs, mask=in_columns & (k[:, None] < depth - start), other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    return acc


@triton.jit
def product_tma(
    acc,  # (BLOCK_M, BLOCK_N) float32
    x_desc,  # of (B, T, ...), boxes (1, BLOCK_M, BLOCK_K)
    w_desc,  # of (E, N, K), boxes (1, BLOCK_N, BLOCK_K); if W_TRANSPOSED of (E, K, N), boxes (1, BLOCK_K, BLOCK_N)
    b,  # tile, int32
    e,  # its expert, int32
    m,  # first token
    n,  # first column
    first_k,  # where in x the depth begins
    depth,
    INPUT_PRECISION: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same sum from tensor descriptors: the hardware reads 0 past tokens, columns and depth."""
    for k in range(0, depth, BLOCK_K):
        x = x_desc.load([b, m, first_k + k]).reshape(acc.shape[0], BLOCK_K)
        if W_TRANSPOSED:
            w = w_desc.load([e, k, n]).reshape(BLOCK_K, acc.shape[1])
        else:
            w = w_desc.load([e, n, k]).reshape(acc.shape[1], BLOCK_K).T
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def finish(
    acc,  # (BLOCK_M, BLOCK_N) float32, the bare product
    b,  # tile, int64
    e,  # its expert, int64
    m,  # (BLOCK_M,) tokens
    n,  # (BLOCK_N,) columns of the weight
    first_column,  # where the weight's columns begin among those of the output
    bias_ptr,  # (E, columns) of the weight, or None
    scale_ptr,  # (E, width) or None
    residual_ptr,  # laid out like y, or None
    y_ptr,  # (B, T, width)
    pre_ptr,  # laid out like y, or None
    tokens,
    columns,  # of the weight
    width,  # of the output: the columns of all its weights
    stride_yb,
    stride_yt,
    ACTIVATION: tl.constexpr,
):
    """Store pre = acc + bias and y = scale * act(pre) + residual, in float32, each rounded once."""
    inside = (m[:, None] < tokens) & (n[None, :] < columns)
    column = first_column + n
    place = b * stride_yb + (m[:, None] * stride_yt + column[None, :])
    z = acc
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e * columns + n, mask=n < columns, other=0.0)
        z += bias[None, :].to(tl.float32)
    if pre_ptr is not None:
        tl.store(pre_ptr + place, z.to(pre_ptr.dtype.element_ty), mask=inside)
    y = activate(z, ACTIVATION)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + e * width + column, mask=n < columns, other=0.0)
        y *= scale[None, :].to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
