"""Argument checks the ops share. Every message: ``<op>: <name> must <condition>, got <value>``."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.routing import Routing, check_bounds


def require(holds: bool, op: str, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {name} must {condition}, got {got}")


def require_shape(op: str, name: str, tensor: Tensor, *shape: int | str) -> None:
    """Each entry of ``shape`` is a size, or a letter that stands for any size of at least 1."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    ok = tensor.ndim == len(shape) and all(
        size >= 1 if isinstance(want, str) else size == want
        for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not ok:
        want = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        raise ValueError(f"{op}: {name} must have shape {want}, got {tuple(tensor.shape)}")


def require_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Same device and dtype as ``x``."""
    if tensor.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}"
        )
    if tensor.dtype != x.dtype:
        raise ValueError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


def require_parameter(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Device of ``x``, and its dtype or, with float32 features, a narrower floating one."""
    narrower = x.dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
    if tensor.device != x.device or not narrower:
        require_like(op, name, tensor, x)


def require_floating(op: str, name: str, tensor: Tensor) -> None:
    require(
        isinstance(tensor, Tensor) and tensor.is_floating_point(),
        op,
        name,
        "be a floating-point tensor",
        tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__,
    )


def require_features(op: str, x: Tensor, width: int, cu_seqlens: Tensor | None, name: str) -> None:
    """(B, T, width), or packed rows (R, width) where ``cu_seqlens``, an argument of that name, is given.

    Its values are checked on a CPU alone: on a GPU the host would wait for them.
    """
    if cu_seqlens is None:
        return require_shape(op, "x", x, "B", "T", width)
    require_shape(op, "x", x, "R", width)
    require_shape(op, name, cu_seqlens, "B + 1")
    where = f"be on the device of x, {x.device}"
    require(cu_seqlens.device == x.device, op, name, where, cu_seqlens.device)
    require(cu_seqlens.dtype == torch.int32, op, name, "have dtype int32", cu_seqlens.dtype)
    strides = f"strides {cu_seqlens.stride()}"
    require(cu_seqlens.is_contiguous(), op, name, "be contiguous", strides)
    check_bounds(op, name, cu_seqlens, x.shape[0])


def require_routed_features(op: str, x: Tensor, width: int, routing: Routing) -> None:
    """The same, as the routing has it."""
    require(isinstance(routing, Routing), op, "routing", "be a Routing", type(routing).__name__)
    require_features(op, x, width, routing.cu_seqlens, "routing.cu_seqlens")


def tiles_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def require_routing(op: str, routing: Routing, x: Tensor, num_experts: int) -> None:
    """All that a kernel takes for granted; which ids there are, only ``Routing`` can have checked."""
    batch, device = tiles_of(x, routing.cu_seqlens), x.device
    for tensor, size in zip(routing[:3], (batch, batch, num_experts + 1), strict=True):
        if not (
            isinstance(tensor, Tensor)
            and tensor.dtype == torch.int32
            and tensor.shape == (size,)
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            _refuse_routing(op, routing, x, batch, num_experts)


def _refuse_routing(op: str, routing: Routing, x: Tensor, batch: int, num_experts: int) -> None:
    require_shape(op, "routing.expert", routing.expert, batch)
    require_shape(op, "routing.order", routing.order, batch)
    require_shape(op, "routing.offsets", routing.offsets, "E + 1")
    experts = f"be over the weight's {num_experts} experts"
    require(routing.num_experts == num_experts, op, "routing", experts, routing.num_experts)
    for name, tensor in zip(routing._fields[:3], routing[:3], strict=True):
        where = f"be on the device of x, {x.device}"
        require(tensor.device == x.device, op, "routing", where, tensor.device)
        require(
            tensor.dtype == torch.int32, op, f"routing.{name}", "have dtype int32", tensor.dtype
        )
        strides = f"strides {tensor.stride()}"
        require(tensor.is_contiguous(), op, f"routing.{name}", "be contiguous", strides)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for matrix products of ``x``; None outside autocast and, as in PyTorch, for float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
