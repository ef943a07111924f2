"""grouped_linear: all tiles, experts and weights of a call in one launch of csrc/cuda/grouped_linear.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.activations import ACTIVATIONS
from mixpert_kernels.backends.reference.grouped_linear import stores_pre

from . import _configs, _launch, _wgmma
from ._backward import grouped_linear_backward
from ._operands import ALIGNMENT, Rows, aligned, alike, cdiv, named, padded, strides

__all__ = ["grouped_linear", "grouped_linear_backward"]


def grouped_linear(
    x: Tensor,  # (B, T, K) or (R, K)
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    residual: Tensor | None,  # as y
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor]:  # (B, T, N) or (R, N), pre-activation as y or empty
    """One launch for up to three weights of one shape; a call with others takes one for each run of such weights.

    Rows of x and of the weights that do not begin at multiples of 16 bytes, and weights of another dtype, are copied
    first.
    """
    width = sum(w.shape[1] for w in weights)
    x, weights = padded(x), [padded(w.to(x.dtype)) for w in weights]
    y, rows = x.new_empty(*x.shape[:-1], width), Rows.of(x, cu_seqlens)
    pre = torch.empty_like(y) if stores_pre(activation, scale, for_backward) else None
    residual = None if residual is None else residual.contiguous()
    column = 0
    while weights:
        count = alike(weights)
        columns = slice(column, column + count * weights[0].shape[1])
        wgmma = _wgmma.serves(_configs.chip(x.device), x.dtype, *weights[0].shape[1:])
        launch = _wgmma.launch_side_by_side if wgmma else _launch_side_by_side
        launch(
            x,
            rows,
            weights[:count],
            [bias.to(x.dtype).contiguous() for bias in biases[:count]],
            expert,
            order,
            activation,
            *(None if t is None else t[..., columns] for t in (residual, y, pre)),
            scale=None if scale is None else scale[:, columns].to(x.dtype).contiguous(),
        )
        weights, biases, column = weights[count:], biases[count:], columns.stop
    return y, x.new_empty(0) if pre is None else pre


def _launch_side_by_side(
    x, rows, weights, biases, expert, order, activation, residual, y, pre, *, scale
) -> None:
    columns = weights[0].shape[1]
    outputs = (y, pre, residual, scale, *biases)

    def blocks(facts: dict[str, int]) -> int:
        column_blocks = len(weights) * cdiv(columns, facts["block_n"])
        return rows.blocks(facts["block_m"]) * column_blocks

    kernel = _configs.of_size(f"grouped_linear_{_configs.SUFFIX[x.dtype]}", x.device, blocks)
    count = blocks(_launch.kernels()[kernel].constants)
    args = {
        "x": x,
        **named("w{}", weights),
        **named("b{}", biases),
        "scale": scale,
        "residual": residual,
        "y": y,
        "pre": pre,
        "expert": expert,
        "order": order,
        **strides("stride_x{}", x, "bt"),
        **strides("stride_w{}", weights[0], "en"),
        **strides("stride_y{}", y, "bt"),
        **rows.arguments(),
        "columns": columns,
        "depth": x.shape[-1],
        "weights": len(weights),
        "activation": ACTIVATIONS.index(activation),
        "vectors": columns * x.element_size() % ALIGNMENT == 0 and aligned(*outputs),
    }
    _launch.launch(kernel, _configs.persistent(kernel, x.device, count), args)
