"""Layers that all images share, by the grouped ops: so an image's bits do not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixpert_kernels.routing import Routing

from .leaves import activation_name, is_hooked, is_plain, linear, mlp


def shared_linear(
    x: Tensor,  # (B, T, K), or (R, K) where the routing has cu_seqlens
    leaves: tuple[nn.Module, ...],
    routing: Routing,  # of B tiles to one expert
    residual: Tensor | None = None,
) -> Tensor:
    """The outputs of ``leaves`` side by side, as one product, plus ``residual``.

    A leaf that was replaced or hooked since (LoRA, quantised weights, offloading) is called instead. Under autocast the
    residual is added apart, in its own dtype, as PyTorch does.
    """
    plain = _are_plain(leaves)
    if plain and (residual is None or not torch.is_autocast_enabled(x.device.type)):
        return linear(x, leaves, routing, residual=residual)
    if plain:
        y = linear(x, leaves, routing)
    else:
        y = torch.cat([leaf(x) for leaf in leaves], -1) if len(leaves) > 1 else leaves[0](x)
    return y if residual is None else residual + y


def shared_mlp(
    x: Tensor,  # (B, T, K)
    first: nn.Module,
    activation: nn.Module,  # that shared_mlp is to compute; called only where a leaf is
    second: nn.Module,
    routing: Routing,
    residual: Tensor | None = None,
) -> Tensor:
    """``second(activation(first(x))) + residual`` as one op; as ``shared_linear`` otherwise."""
    if not _are_plain((first, second)):
        return shared_linear(activation(first(x)), (second,), routing, residual)
    name = activation_name(activation)
    if residual is None or not torch.is_autocast_enabled(x.device.type):
        return mlp(x, first, second, routing, activation=name, residual=residual)
    return residual + mlp(x, first, second, routing, activation=name)


def _are_plain(leaves: tuple[nn.Module, ...]) -> bool:
    return all(is_plain(leaf) and not is_hooked(leaf) for leaf in leaves)
