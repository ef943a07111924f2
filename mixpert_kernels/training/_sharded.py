"""FSDP2: experts stay whole along dimension 0, states are saved as whole tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .stages import is_grouped


def shard_placement(parameter: nn.Parameter) -> Shard | None:
    """Choose the dimension that FSDP2 shards a parameter along: never the experts'.

    For ``fully_shard(module, shard_placement_fn=shard_placement)``, after ``set_stage``. A parameter (E, N, ...) of the
    experts goes by the first dimension from 1 on that the processes divide evenly; FSDP2 raises where there is none.
    Units are modules whose forward is called: blocks of the trunk, ``tower.experts[i]``, ``tower.projector``, the tower
    or the model around it; not ``tower.trunk``, whose parts the tower calls itself.

    Args:
        parameter: not sharded yet.

    Returns:
        Where an expert's parameter is sharded; None, FSDP2's own choice (dimension 0), for any other.
    """
    if not is_grouped(parameter):
        return None
    processes = dist.get_world_size()
    even = [d for d in range(1, parameter.ndim) if parameter.shape[d] % processes == 0]
    return Shard(even[0] if even else 1)


def check_sharding(grouped: dict[str, nn.Parameter]) -> None:
    """Raise ValueError if an expert's parameter (E, ...) is sharded along its experts."""
    for name, parameter in grouped.items():
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if any(isinstance(p, Shard) and p.dim == 0 for p in placements):
            raise ValueError(
                "ExpertOptimizer: model must be sharded by fully_shard(..., shard_placement_fn=shard_placement), got "
                f"{name} sharded along its experts"
            )


def whole(value: Any) -> Any:
    """A sharded tensor's full values, which every process must ask for; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def scattered(value: Any, like: Tensor) -> Any:
    """A saved state of a parameter, sharded as the parameter is."""
    if isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.shape == like.shape:
        value = value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
