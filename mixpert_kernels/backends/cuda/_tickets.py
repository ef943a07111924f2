"""What the launches share whose blocks draw tickets (csrc/cuda/tickets.cuh), and when they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.activations import ACTIVATIONS

from . import _configs, _launch, _wgmma
from ._operands import ALIGNMENT, WEIGHTS, aligned, alike, cdiv, named, padded, strides
from .grouped_layer_norm import vectors


def serves(kernel: str, x: Tensor, weights: list[Tensor]) -> bool:
    """Whether one launch, of such a kernel, gives bit for bit what the separate ones give; if not, those run.

    Not for rows that a warp does not hold or that are no vectors, nor for weights of several shapes.
    """
    return (
        alike(weights) == len(weights) <= WEIGHTS
        and vectors(x)
        and x.shape[2] <= _launch.kernels()[kernel].constants["widest"]
    )


def multiplies_by_wgmma(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether grouped_linear does: it adds in another order than mma.sync, so that tickets must too."""
    return _wgmma.serves(_configs.chip(x.device), x.dtype, *weights[0].shape[1:])


def waves(x: Tensor, weights: list[Tensor]) -> float:
    """How many of grouped_linear's blocks there are for each multiprocessor, where wgmma multiplies."""
    blocks = output_blocks(x, weights)(_launch.kernels()[_wgmma.kernel(x.dtype)].constants)
    return blocks / _configs.chip(x.device).multiprocessors


def prepared(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Features and weights as kernels read them."""
    return padded(x), [padded(w.to(x.dtype)) for w in weights]


def output_blocks(x: Tensor, weights: list[Tensor]) -> Callable[[dict[str, int]], int]:
    """How many blocks of outputs a kernel of given constants has."""

    def blocks(facts: dict[str, int]) -> int:
        columns = len(weights) * cdiv(weights[0].shape[1], facts["block_n"])
        return row_blocks(x, facts) * columns

    return blocks


def row_blocks(x: Tensor, facts: dict[str, int]) -> int:
    return x.shape[0] * cdiv(x.shape[1], facts["block_m"])


def arguments(
    x: Tensor,  # (B, T, D)
    norm_weight: Tensor,  # (E, D)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N, D)
    biases: list[Tensor],  # each (E, N), or empty
    activation: str,
) -> dict[str, Any]:
    """MIXPERT_TICKET_FIELDS, but for the counters."""
    columns = weights[0].shape[1]
    biases = [bias.to(x.dtype).contiguous() for bias in biases]
    y = x.new_empty(*x.shape[:2], len(weights) * columns)
    return {
        "x": x,
        "norm_weight": padded(norm_weight).contiguous(),
        "norm_bias": None if norm_bias is None else padded(norm_bias).contiguous(),
        **named("w{}", weights),
        **named("b{}", biases),
        "h": x.new_empty(x.shape),
        "y": y,
        **strides("stride_x{}", x, "bt"),
        **strides("stride_w{}", weights[0], "en"),
        **strides("stride_y{}", y, "bt"),
        "tokens": x.shape[1],
        "width": x.shape[2],
        "depth": x.shape[2],
        "columns": columns,
        "weights": len(weights),
        "activation": ACTIVATIONS.index(activation),
        "vectors": columns * x.element_size() % ALIGNMENT == 0 and aligned(y, *biases),
        "norm_eps": norm_eps,
    }


def zeros(x: Tensor, count: int) -> Tensor:
    """A launch's counters. One memset a call: counters that outlive it would break with two streams."""
    return x.new_zeros(count, dtype=torch.int32)
