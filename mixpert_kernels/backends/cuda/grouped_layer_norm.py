"""grouped_layer_norm and its backward: rows by warps, gradients of gain and offset in parts, added without atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _configs, _launch
from ._operands import Rows, cdiv, padded, rows_dense, strides
from ._reduce import sums_by_expert


def grouped_layer_norm(
    x: Tensor,  # (B, T, D) or (R, D)
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # as x, mean (B, T, 1) or (R, 1) float32, rstd like it
    rows, width = Rows.of(x, cu_seqlens), x.shape[-1]
    kernel = f"grouped_layer_norm_{_configs.SUFFIX[x.dtype]}"
    facts = _launch.kernels()[kernel]
    if not vectors(x):
        kernel += "_any"
    elif width > facts.constants["widest"]:
        kernel += "_wide"
    x = _rows(x)
    y = x.new_empty(x.shape)
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    args = {
        "x": x,
        "weight": _rows(weight).contiguous(),
        "bias": None if bias is None else _rows(bias).contiguous(),
        "y": y,
        "mean": mean,
        "rstd": rstd,
        "expert": expert,
        **strides("stride_x{}", x, "bt"),
        **rows.arguments(),
        "width": width,
        "eps": eps,
    }
    size = _launch.kernels()[kernel].constants["rows"]
    tiles = rows.batch if cu_seqlens is None else 1  # a packed row looks for its tile itself
    _launch.launch(kernel, tiles * cdiv(rows.tokens, size), args)
    return y, mean, rstd


def grouped_layer_norm_backward(
    dy: Tensor,  # (B, T, D) or (R, D)
    x: Tensor,  # as dy
    weight: Tensor,  # (E, D)
    bias: Tensor | None,  # (E, D)
    mean: Tensor,  # (B, T, 1) or (R, 1) float32
    rstd: Tensor,  # as mean
    expert: Tensor,  # (B,) int32
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    cu_seqlens: Tensor | None,  # (B + 1,) int32
) -> tuple[Tensor, Tensor, Tensor]:  # as x, (E, D), (E, D) or empty
    rows, width = Rows.of(x, cu_seqlens), x.shape[-1]
    kernel = f"grouped_layer_norm_backward_{_configs.SUFFIX[x.dtype]}"
    if not vectors(x):
        kernel += "_any"
    chunk = _launch.kernels()[kernel].constants["tokens"]
    dy, x = _rows(dy), _rows(x)
    dx = x.new_empty(x.shape)
    widths = [width] if bias is None else [width, width]
    parts = x.new_empty(*rows.slots(chunk), sum(widths), dtype=torch.float32)
    args = {
        "dy": dy,
        "x": x,
        "weight": _rows(weight).contiguous(),
        "mean": mean.contiguous(),
        "rstd": rstd.contiguous(),
        "dx": dx,
        "parts": parts,
        "expert": expert,
        **strides("stride_g{}", dy, "bt"),
        **strides("stride_x{}", x, "bt"),
        **rows.arguments(),
        "width": width,
        "has_bias": bias is not None,
    }
    _launch.launch(kernel, rows.blocks(chunk), args)
    by_expert = (order, offsets, weight.shape[0])
    packed = {"cu_seqlens": cu_seqlens, "chunk": chunk}
    grads = sums_by_expert(parts, widths, *by_expert, weight.dtype, **packed)
    return dx, grads[0], weight.new_empty(0) if bias is None else grads[1]


def vectors(x: Tensor) -> bool:
    """Whether rows as wide as these fill 16-byte vectors: it decides the order of their sums, so no address may."""
    return x.shape[-1] * x.element_size() % 16 == 0


def _rows(x: Tensor) -> Tensor:
    """Rows as the kernel reads them."""
    return padded(x) if vectors(x) else rows_dense(x)
