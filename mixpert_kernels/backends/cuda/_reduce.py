"""The elementwise part of a grouped layer's backward, dz = dy * scale * act'(pre), and sums over an expert's tokens.

Sums are made in two steps, without atomics: chunks of a tile's tokens first, then the chunks of each expert's tiles in
order. A chunk's size is a constant, so an expert's sums are bit for bit what its own tiles alone give.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from . import _configs, _launch
from ._operands import WEIGHTS, Rows, aligned, cdiv, named, rows_dense, strides


def backward_parts(
    dy: Tensor,  # (B, T, N) or (R, N)
    pre: Tensor | None,  # as dy
    scale: Tensor | None,  # (E, N)
    expert: Tensor,  # (B,) int32
    activation: str,
    needs_bias: bool,
    needs_scale: bool,
    needs_dz: bool = True,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor | None]:  # as dy, (B, S, N) or (B, S, 2 N) float32
    """dz = dy * scale * act'(pre), and the parts of the sums for bias and for scale side by side, in one launch.

    dz is dy itself where there is neither an activation nor a scale. ``pre`` is read where there is an activation, or
    for scale. The parts of packed rows are (slots, N) or (slots, 2 N), and what no row is in stays unwritten.
    """
    dy, rows = rows_dense(dy), Rows.of(dy, cu_seqlens)
    unchanged = scale is None and activation == "none"
    needs_dz = needs_dz and not unchanged
    if not (needs_dz or needs_bias or needs_scale):
        return dy, None
    kernel = f"activation_backward_{_configs.SUFFIX[dy.dtype]}"
    constants = _launch.kernels()[kernel].constants
    width, chunks = dy.shape[-1], rows.slots(constants["chunk"])
    pre = rows_dense(pre) if needs_scale or activation != "none" else None
    scale = None if scale is None else scale.to(dy.dtype).contiguous()
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_dz else None
    columns = (needs_bias + needs_scale) * width
    parts = dy.new_empty(*chunks, columns, dtype=torch.float32) if columns else None
    args = {
        "dy": dy,
        "pre": pre,
        "scale": scale,
        "expert": expert,
        "dz": dz,
        "bias": parts if needs_bias else None,
        "dscale": parts[..., -width:] if needs_scale else None,
        **rows.arguments(),
        "width": width,
        "activation": ACTIVATIONS.index(activation),
        "vectors": aligned(dy, pre, scale, dz) and width * dy.element_size() % 16 == 0,
        **strides("stride_y{}", dy, "bt"),
        **strides("stride_p{}", pre, "bt"),
        "stride_s": columns,
    }
    _launch.launch(kernel, math.prod(chunks) * cdiv(width, constants["columns"]), args)
    return dy if dz is None else dz, parts


def sums_by_expert(
    partial: Tensor,  # (B, S, C) or (slots, C) float32, C = sum of widths
    widths: list[int],
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    num_experts: int,
    dtype: torch.dtype,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
    chunk: int | None = None,
) -> list[Tensor]:  # each (E, widths[i])
    """Sums over S and the tiles of each expert, in order, a tensor for each of ``widths``; a launch for up to three.

    Exact zeros for an expert without a tile. ``chunk``: rows that a partial sum is of, by default those of
    ``backward_parts``; it says which slots of packed rows were written.
    """
    if chunk is None:
        chunk = _launch.kernels()[f"activation_backward_{_configs.SUFFIX[dtype]}"].constants[
            "chunk"
        ]
    kernel = f"sum_by_expert_{_configs.SUFFIX[dtype]}"
    columns = _launch.kernels()[kernel].constants["columns"]
    outs = [partial.new_empty(num_experts, width, dtype=dtype) for width in widths]
    for first in range(0, len(widths), WEIGHTS):
        out = outs[first : first + WEIGHTS]
        chosen = [o.shape[1] for o in out] + [0] * (WEIGHTS - len(out))
        blocks = sum(cdiv(width, columns) for width in chosen)
        args = {
            "part": partial[..., sum(widths[:first]) :],
            **named("out{}", out),
            "order": order,
            "offsets": offsets,
            "cu_seqlens": cu_seqlens,
            **{f"width{i}": width for i, width in enumerate(chosen)},
            "blocks": blocks,
            "chunks": partial.shape[-2],
            "chunk": chunk,
            **strides("stride_{}", partial, "bs"),
        }
        _launch.launch(kernel, num_experts * blocks, args)
    return outs
