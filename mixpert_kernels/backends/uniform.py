"""What a backend says of packed rows until it takes them."""

from __future__ import annotations

from torch import Tensor

# The ops that a backend has for (B, T, D) alone. A backend takes one up by leaving this table.
OPS = (
    "grouped_layer_norm",
    "grouped_linear",
    "grouped_mlp",
    "norm_grouped_linear",
    "route",
    "route_grouped_linear",
)
UNIFORM_ONLY: dict[str, tuple[str, ...]] = {}


def refuse_packed(op: str, backend: str, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise RuntimeError(f"{op}: packed rows are not supported by the {backend} backend yet")
