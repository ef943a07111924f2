"""Projectors a configuration can describe, and so a checkpoint can be rebuilt with.

A projector is any module that maps (B, T, D) to (B, T, P). Described are nn.Linear, nn.Sequential of linear layers,
LayerNorms and activations, and modules of LLaVA's shape (``linear_1``, ``act``, ``linear_2``). Any other works in
memory and can't be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from mixpert_kernels.modules.leaves import activation_name
from mixpert_kernels.modules.mlp import PLANS

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "none": "linear"}


class LinearActLinear(nn.Module):
    """The projector of LLaVA's families, under its parameter names."""

    def __init__(self, linear_1: nn.Module, act: nn.Module, linear_2: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = linear_1, act, linear_2

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


def describe(projector: nn.Module | None) -> dict[str, Any] | None:
    """Return what ``build`` needs to make a projector like this one; ``{"kind": "custom"}`` for one it can't."""
    if projector is None:
        return None
    if isinstance(projector, nn.Linear):
        return _described("linear", [projector])
    if type(projector) is nn.Sequential:
        return _described("sequential", list(projector))
    # By class: another module may have parts of these names and use them otherwise.
    plan = PLANS.get(type(projector).__name__)
    children = dict(projector.named_children())
    if plan is not None and list(children) == [plan.first, plan.activation, plan.second]:
        return _described("llava", list(children.values()))
    return {"kind": "custom", "out_features": None}


def build(description: dict[str, Any] | None) -> nn.Module | None:
    """Return a new projector with uninitialised weights' values as PyTorch gives them.

    Raises:
        ValueError: the description is of a custom projector.
    """
    if description is None:
        return None
    if description["kind"] == "custom":
        raise ValueError(
            "FusedMixpertTower: projector must be nn.Linear, nn.Sequential or of LLaVA's shape to be built from a "
            "configuration, got a custom module"
        )
    layers = [_build_layer(row) for row in description["layers"]]
    if description["kind"] == "linear":
        return layers[0]
    return (
        nn.Sequential(*layers) if description["kind"] == "sequential" else LinearActLinear(*layers)
    )


def _described(kind: str, layers: list[nn.Module]) -> dict[str, Any]:
    rows = [_describe_layer(layer) for layer in layers]
    if any(row is None for row in rows):
        return {"kind": "custom", "out_features": None}
    widths = [row["out_features"] for row in rows if "out_features" in row]
    return {"kind": kind, "layers": rows, "out_features": widths[-1] if widths else None}


def _describe_layer(layer: nn.Module) -> dict[str, Any] | None:
    if type(layer) is nn.Linear:
        return {
            "type": "linear",
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1:
        return {"type": "layer_norm", "width": layer.normalized_shape[0], "eps": layer.eps}
    name = "silu" if type(layer).__name__ in ("SiLU", "SiLUActivation") else activation_name(layer)
    return None if name is None else {"type": "activation", "name": name}


def _build_layer(row: dict[str, Any]) -> nn.Module:
    if row["type"] == "linear":
        return nn.Linear(row["in_features"], row["out_features"], bias=row["bias"])
    if row["type"] == "layer_norm":
        return nn.LayerNorm(row["width"], eps=row["eps"])
    return ACT2FN[ACTIVATIONS[row["name"]]]
