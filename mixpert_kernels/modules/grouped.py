"""Leaves that hold E copies of a leaf's parameters and read the batch's routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpert_kernels.ops import grouped_layer_norm, grouped_linear
from mixpert_kernels.routing import Routing, tile_of_row

from .binding import bound_routing, peek


class GroupedLinear(nn.Module):
    """E linear layers; each tile goes through its expert's.

    Args:
        in_features: K.
        out_features: N.
        num_experts: E.
        bias: whether there is one.

    Shape: (B, ..., K) -> (B, ..., N), or packed rows (R, K) -> (R, N) where the routing has ``cu_seqlens``. Parameters:
    ``weight`` (E, N, K), ``bias`` (E, N) or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_experts = (
            in_features,
            out_features,
            num_experts,
        )
        like = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **like))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **like)) if bias else None
        self.reset_parameters()

    @classmethod
    def clone(cls, leaf: nn.Linear, num_experts: int) -> GroupedLinear:
        """Return ``num_experts`` copies of ``leaf``."""
        weight = leaf.weight
        grouped = cls(
            leaf.in_features,
            leaf.out_features,
            num_experts,
            bias=leaf.bias is not None,
            device=torch.device("meta"),
        )
        grouped.weight = stacked(weight, num_experts)
        if leaf.bias is not None:
            grouped.bias = stacked(leaf.bias, num_experts)
        return grouped

    def reset_parameters(self) -> None:
        """Initialise each expert as nn.Linear does."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        tokens, routing = flat(x, type(self).__name__)
        y = grouped_linear(tokens, self.weight, self.bias, routing)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, bias={self.bias is not None}"
        )


class GroupedLayerNorm(nn.Module):
    """E LayerNorms over the last dimension. Shape: that of x, (B, ..., D) or packed rows (R, D); parameters (E, D)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    @classmethod
    def clone(cls, leaf: nn.LayerNorm, num_experts: int) -> GroupedLayerNorm:
        if len(leaf.normalized_shape) != 1 or leaf.weight is None:
            raise ValueError("normalises over several dimensions or has no gain")
        bias = None if leaf.bias is None else stacked(leaf.bias, num_experts)
        return cls(stacked(leaf.weight, num_experts), bias, leaf.eps)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens, routing = flat(x, type(self).__name__)
        y = grouped_layer_norm(tokens, self.weight, self.bias, routing, eps=self.eps)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.weight.shape[0]}, eps={self.eps}"


class GroupedRMSNorm(nn.Module):
    """E RMSNorms over the last dimension: ``x / sqrt(mean(x^2) + eps) * (offset + weight[e])``.

    The statistics and the product are float32 (float64 for float64), rounded once before the gain unless ``offset`` is
    1: so do Llama's (offset 0) and Gemma's (offset 1) norms.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        gain = by_tile(self.weight, x, type(self).__name__)
        wide = F.rms_norm(accurate(x), x.shape[-1:], eps=self.eps)
        if self.offset:
            return (wide * (self.offset + accurate(gain))).to(x.dtype)
        return gain * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.weight.shape[0]}, eps={self.eps}"


class GroupedParameter(nn.Module):
    """A loose parameter (E, ...) of a block, such as a LayerScale: reads as (B, 1, ...) or, a matrix, as (B, K, N).

    Where the block runs on packed rows (R, D), a vector reads as (R, D).

    Registered as a parametrization, so that the block's own ``self.lambda_1`` is the batch's gathered rows.
    """

    def forward(self, original: Tensor) -> Tensor:
        _, rows = peek()
        return rows_of(original, bound_routing(type(self).__name__, rows), rows)


def rows_of(parameter: Tensor, routing: Routing, rows: int | None = None) -> Tensor:
    """A loose parameter (E, ...) as it multiplies or is added to a batch: (B, 1, ...) or, a matrix, (B, K, N).

    A vector (E, D) to ``rows`` packed rows is (R, D); a matrix has no such form.
    """
    if routing.cu_seqlens is not None:
        if parameter.ndim != 2:
            shape = tuple(parameter.shape)
            raise ValueError(f"expertize: packed rows take vectors (E, D) of a block, got {shape}")
        return by_row(parameter, routing, rows)
    gathered = parameter[routing.expert]
    return gathered.unsqueeze(1) if gathered.ndim == 2 else gathered


def stacked(parameter: Tensor, num_experts: int) -> nn.Parameter:
    """Return (E, ...) copies of a parameter, trainable as it was."""
    copies = parameter.detach().unsqueeze(0).repeat(num_experts, *[1] * parameter.ndim)
    return nn.Parameter(copies, requires_grad=parameter.requires_grad)


def flat(x: Tensor, leaf: str) -> tuple[Tensor, Routing]:
    """(B, ..., K) -> (B, T, K), or (..., K) -> packed rows (R, K); and the routing of these."""
    routing = bound_routing(leaf, x.shape[:-1].numel())
    if routing.cu_seqlens is not None:
        return x.reshape(-1, x.shape[-1]), routing
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1]), routing


def by_row(table: Tensor, routing: Routing, rows: int) -> Tensor:
    """Rows (E, D) of the expert of each packed row: (R, D).

    In float32 meanwhile: the gradient of a row is a sum over all of an expert's rows, and has their accuracy.
    """
    expert = routing.expert[tile_of_row(routing.cu_seqlens, rows)]
    return F.embedding(expert, accurate(table)).to(table.dtype)


def accurate(x: Tensor) -> Tensor:
    """In float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def by_tile(table: Tensor, x: Tensor, leaf: str) -> Tensor:
    """Rows (E, D) of each tile's expert, shaped to multiply ``x`` (B, ..., D), or packed rows (R, ..., D)."""
    count = x.shape[:-1].numel()
    routing = bound_routing(leaf, count)
    if routing.cu_seqlens is not None:
        return by_row(table, routing, count).view(x.shape)
    rows = table[routing.expert]
    return rows.view(x.shape[0], *[1] * (x.ndim - 2), rows.shape[-1])
