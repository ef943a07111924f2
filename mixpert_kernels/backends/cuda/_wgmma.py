"""grouped_linear on sm_90 by TMA and wgmma: csrc/cuda/grouped_linear_sm90a.cuh.

A wgmma adds in another order than mma.sync does. So that a tile's result does not depend on its batch, which of the two
serves a layer follows from the chip, the dtype and the layer's own sizes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends.chips import Chip, tma_allowed
from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from . import _configs, _launch
from ._operands import ALIGNMENT, WEIGHTS, Rows, aligned, cdiv, named, strides

# Blocks have 128 columns and steps 64 of the depth: with fewer than this, more than half would be computed for nothing.
LEAST_COLUMNS, LEAST_DEPTH = 64, 64


def serves(on: Chip, dtype: torch.dtype, columns: int, depth: int) -> bool:
    """Whether the products of a layer are made by wgmma.

    ``_configs.forced`` overrides the choice, ``MIXPERT_TMA=0`` turns TMA off and with it this.

    Args:
        on: the chip; only sm_90 has these instructions, no later chip either.
        dtype: of the features; float16 or bfloat16.
        columns, depth: N and K of one weight.
    """
    if on.arch != 90 or kernel(dtype) not in _launch.kernels():
        return False
    choice = _configs.choice()
    if choice is not None:
        return choice == "wgmma" and depth > 0
    return tma_allowed() and columns >= LEAST_COLUMNS and depth >= LEAST_DEPTH


def kernel(dtype: torch.dtype) -> str:
    return f"grouped_linear_{_configs.SUFFIX[dtype]}_wgmma"


def launch_side_by_side(
    x: Tensor,  # (B, T, K) or (R, K)
    rows: Rows,
    weights: list[Tensor],  # up to three of one shape, each (E, N, K)
    biases: list[Tensor],  # each (E, N), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    activation: str,
    residual: Tensor | None,  # (B, T, columns of all weights) or (R, ...), laid out like y
    y: Tensor,
    pre: Tensor | None,  # laid out like y
    *,
    scale: Tensor | None,  # (E, columns of all weights)
) -> None:
    """One launch; rows of x and of the weights begin at multiples of 16 bytes."""
    columns = weights[0].shape[1]
    name = kernel(x.dtype)
    facts = _launch.kernels()[name].constants
    column_blocks = len(weights) * cdiv(columns, facts["block_n"])
    blocks = rows.blocks(facts["block_m"]) * column_blocks
    maps = [described(w, facts["block_n"], facts["block_k"]) for w in weights]
    args = {
        "x": described(x if x.ndim == 3 else x[None], facts["block_m"], facts["block_k"]),
        # A weight that there is not is never read, but no tensor map describes nothing.
        **{f"w{i}": maps[min(i, len(maps) - 1)] for i in range(WEIGHTS)},
        **named("b{}", biases),
        "scale": scale,
        "residual": residual,
        "y": y,
        "pre": pre,
        "expert": expert,
        "order": order,
        **strides("stride_y{}", y, "bt"),
        **rows.arguments(),
        "columns": columns,
        "depth": x.shape[-1],
        "weights": len(weights),
        "activation": ACTIVATIONS.index(activation),
        "vectors": columns * x.element_size() % ALIGNMENT == 0
        and aligned(y, pre, residual, scale, *biases),
    }
    _launch.launch(name, _configs.persistent(name, x.device, blocks), args)


def described(tensor: Tensor, rows: int, depth: int) -> _launch.TensorMap:
    """The tensor in boxes of so many rows and numbers along k, zeros outside; copied if it is an expanded one."""
    return _launch.TensorMap(
        tensor.contiguous() if 0 in tensor.stride() else tensor, (1, rows, depth)
    )
