"""grouped_mlp on a CPU: two fused oneDNN linears for each run of tiles that share an expert."""

from torch import Tensor

from mixpert_kernels.backends.reference.grouped_mlp import (
    grouped_mlp_backward as grouped_mlp_backward,
)
from mixpert_kernels.backends.reference.grouped_mlp import two_layers

from . import grouped_linear as linear


def grouped_mlp(
    x: Tensor,  # (B, T, K)
    weight1: Tensor,  # (E, H, K)
    bias1: Tensor | None,  # (E, H)
    weight2: Tensor,  # (E, N, H)
    bias2: Tensor | None,  # (E, N)
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    activation: str,
    residual: Tensor | None,  # (B, T, N)
    scale: Tensor | None,  # (E, N)
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    routing = (expert, order, offsets)
    layers = (weight1, bias1, weight2, bias2)
    return two_layers(linear, x, *layers, routing, activation, residual, scale, for_backward)
