"""adaptive_pool: a program averages the bins of a few neighbours; backward gathers, so that nothing is added twice."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _configs_mome, _launch
from ._rows import aligned_rows, row_pointers
from ._tiles import Rows, locate_rows


@triton.jit
def bin_of(i, cells, bins):
    """The first of bin i's cells, and how many there are, of ``cells`` shared out among ``bins``.

    With the two exchanged it is which bins hold cell i: floor(i n / m) <= k < ceil((i + 1) n / m) says of k and i the
    same as floor(k m / n) <= i < ceil((k + 1) m / n).
    """
    first = i * cells // bins
    return first, tl.cdiv((i + 1) * cells, bins) - first


@triton.jit
def most_in_a_bin(cells, bins):
    """At least as many as any bin has; as many, where one number divides the other."""
    uneven = (cells % bins != 0) & (bins % cells != 0)
    return tl.cdiv(cells, bins) + uneven.to(tl.int32)


@triton.jit
def load_cells(cells, d, valid, C: tl.constexpr, LANES: tl.constexpr):
    """Channels d of cells (ROWS, 1), in float32; 0 where not valid (ROWS,)."""
    mask = valid[:, None] if C % LANES == 0 else valid[:, None] & (d < C)
    return tl.load(cells + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["stride_xr"])
def _adaptive_pool_kernel(
    x_ptr,  # (R, C)
    y_ptr,  # (B, HEIGHT * WIDTH, C)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    stride_xr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    # y[b, i, j] = mean of x[b, h, w] over h in bin i of H and w in bin j of W; row cu_seqlens[b] + h W + w
    #
    # One program averages ROWS neighbours j of one i, LANES channels of each: it reads along a row of the grid.
    # Grid: B * HEIGHT * cdiv(WIDTH, ROWS) * cdiv(C, LANES); H and W never leave the device.
    # A row of a bin is summed patch by patch, then the rows: the order is the image's own, whatever the block.
    slices: tl.constexpr = (C + LANES - 1) // LANES
    groups: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    block = tl.program_id(0) // slices
    d = (tl.program_id(0) % slices * LANES + tl.arange(0, LANES))[None, :]
    b = block // (HEIGHT * groups)
    i = block // groups % HEIGHT
    j = block % groups * ROWS + tl.arange(0, ROWS)
    begin = tl.load(cu_seqlens_ptr + b)
    grid_height = tl.load(sizes_ptr + 2 * b)
    grid_width = tl.load(sizes_ptr + 2 * b + 1)
    h, rows = bin_of(i, grid_height, HEIGHT)
    w, columns = bin_of(j, grid_width, WIDTH)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for r in range(rows):
        row = tl.zeros((ROWS, LANES), tl.float32)
        for first in range(0, most_in_a_bin(grid_width, WIDTH), COLUMNS):
            for c in tl.static_range(COLUMNS):
                at = begin + (h + r) * grid_width
                x = row_pointers(x_ptr, at, w + (first + c), stride_xr, stride_xr, VECTOR)
                row += load_cells(x, d, (first + c < columns) & (j < WIDTH), C, LANES)
        total += row
    mean = tl.div_rn(total, (rows * columns)[:, None].to(tl.float32) + tl.zeros_like(total))
    y = row_pointers(y_ptr, b * (HEIGHT * WIDTH) + i * WIDTH, j, C, C, VECTOR)
    inside = (j < WIDTH)[:, None] & (d < C)
    tl.store(y + d, mean.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "tokens"])
def _adaptive_pool_backward_kernel(
    dy_ptr,  # (B, HEIGHT * WIDTH, C)
    dx_ptr,  # (R, C)
    sizes_ptr,  # (B, 2) int32
    cu_seqlens_ptr,  # (B + 1,) int32
    batch,
    tokens,  # R
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    # dx[b, h, w] = sum of dy[b, i, j] / (rows of bin i * columns of bin j) over the bins i that hold h, j that hold w
    #
    # One program adds up for ROWS patches of one image, LANES channels of each, in the order of i, then j: no atomics.
    # Grid: (R // ROWS + B) * cdiv(C, LANES), see _tiles.py.
    slices: tl.constexpr = (C + LANES - 1) // LANES
    d = (tl.program_id(0) % slices * LANES + tl.arange(0, LANES))[None, :]
    block = tl.program_id(0) // slices
    b, begin, count, first = locate_rows(block, batch, tokens, None, cu_seqlens_ptr, ROWS)
    t = first + tl.arange(0, ROWS)
    grid_height = tl.load(sizes_ptr + 2 * b)
    grid_width = tl.load(sizes_ptr + 2 * b + 1)
    i, rows = bin_of(t // grid_width, HEIGHT, grid_height)
    j, columns = bin_of(t % grid_width, WIDTH, grid_width)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for r in range(most_in_a_bin(HEIGHT, grid_height)):
        _, in_rows = bin_of(i + r, grid_height, HEIGHT)
        for start in range(0, most_in_a_bin(WIDTH, grid_width), COLUMNS):
            for c in tl.static_range(COLUMNS):
                valid = (t < count) & (r < rows) & (start + c < columns)
                _, in_columns = bin_of(j + (start + c), grid_width, WIDTH)
                at = (i + r) * WIDTH + j + (start + c)
                dy = row_pointers(dy_ptr, b, at, HEIGHT * WIDTH * C, C, VECTOR)
                share = tl.div_rn(
                    tl.full((ROWS,), 1.0, tl.float32), (in_rows * in_columns).to(tl.float32)
                )
                total = tl.fma(
                    load_cells(dy, d, valid, C, LANES), share[:, None] + tl.zeros_like(total), total
                )
    dx = row_pointers(dx_ptr, begin, t, C, C, VECTOR)
    tl.store(dx + d, total.to(dx.dtype.element_ty), mask=(t < count)[:, None] & (d < C))


def adaptive_pool(
    x: Tensor,  # (R, C)
    sizes: Tensor,  # (B, 2) int32
    cu_seqlens: Tensor,  # (B + 1,) int32
    height: int,
    width: int,
) -> Tensor:  # (B, height * width, C)
    x, (batch, channels) = aligned_rows(x), (sizes.shape[0], x.shape[1])
    y = x.new_empty(batch, height * width, channels)
    block = _configs_mome.pool(channels, x.element_size())
    args = {"x_ptr": x, "y_ptr": y, "stride_xr": x.stride(0)}
    blocks = batch * height * triton.cdiv(width, block.ROWS)
    _launch_pool(_adaptive_pool_kernel, blocks, args, y, sizes, cu_seqlens, height, width, block)
    return y


def adaptive_pool_backward(
    dy: Tensor,  # (B, height * width, C)
    sizes: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    height: int,
    width: int,
) -> Tensor:  # (R, C)
    dy = aligned_rows(dy.contiguous())
    dx = dy.new_empty(rows, dy.shape[2])
    block = _configs_mome.pool(dy.shape[2], dy.element_size(), backward=True)
    tiles = Rows.of(dx, cu_seqlens)
    args = {"dy_ptr": dy, "dx_ptr": dx, "batch": tiles.batch, "tokens": tiles.tokens}
    blocks = tiles.num_blocks(block.ROWS)
    _launch_pool(
        _adaptive_pool_backward_kernel, blocks, args, dx, sizes, cu_seqlens, height, width, block
    )
    return dx


def _launch_pool(kernel, blocks, args, out, sizes, cu_seqlens, height, width, block) -> None:
    channels = out.shape[-1]
    args |= {"sizes_ptr": sizes, "cu_seqlens_ptr": cu_seqlens, "C": channels}
    args |= {"HEIGHT": height, "WIDTH": width, "ROWS": block.ROWS, "LANES": block.LANES}
    args |= {"COLUMNS": block.COLUMNS, "VECTOR": block.VECTOR}
    _launch.launch(kernel, (blocks * triton.cdiv(channels, block.LANES),), args, block)
