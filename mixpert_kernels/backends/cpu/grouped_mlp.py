"""grouped_mlp on a CPU: two fused oneDNN linears for each run of tiles that share an expert."""

import functools

import torch
from torch import Tensor

from mixpert_kernels.backends.reference.activations import activate
from mixpert_kernels.backends.reference.grouped_mlp import two_layers, two_layers_backward

from . import grouped_linear as linear
from .native import compute_dtype
from .packing import watched
from .runs import join, runs

SLOPE = 1.702  # of quick_gelu


def grouped_mlp(
    x: Tensor,  # (B, T, K)
    weight1: Tensor,  # (E, H, K)
    bias1: Tensor | None,  # (E, H)
    weight2: Tensor,  # (E, N, H)
    bias2: Tensor | None,  # (E, N)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, N), (B, T, H) or empty, (B, T, N) or empty
    """In inference the wide rows between the layers are never put together, and leave the cache late.

    quick_gelu costs no pass over memory then: slope * quick_gelu(z) = swish(slope * z), and the slope goes into the
    first layer's parameters and out of the second's weight. Not in half precision, in which those would round again.
    """
    sources = (weight1, bias1, weight2, bias2, scale)
    if for_backward or not watched(*sources):
        ids = (expert, order, offsets, cu_seqlens)
        return two_layers(linear, x, *sources[:4], *ids, activation, residual, scale, for_backward)
    biases1, biases2 = ([] if bias is None else [bias] for bias in (bias1, bias2))
    slope = 1.0
    if activation == "quick_gelu" and compute_dtype(x.dtype) == torch.float32:
        slope, activation = SLOPE, "swish"
    ys = []
    for e, first, last in runs(expert, cu_seqlens):
        rows = x[first:last]
        h = linear.fused(rows, [weight1], biases1, None, e, activation, None, (slope, slope))
        add = None if residual is None else residual[first:last]
        ys.append(linear.fused(h, [weight2], biases2, scale, e, "none", add, (1 / slope, 1.0)))
    return join(ys), x.new_empty(0), x.new_empty(0)


grouped_mlp_backward = functools.partial(
    two_layers_backward, linear, lambda activation, pre, cu_seqlens: activate(activation, pre)
)
