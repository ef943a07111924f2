"""One process or many: the process group, and a model's parameters spread over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .optimizer import shard_placement
from .stages import find_tower


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this process; 0 writes and prints.
        world: how many there are.
        device: what this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a list that all of them hold: every ``world``-th."""
        return items[self.rank :: self.world]

    def sum(self, numbers: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank; any that can be pickled."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()

    def same(self, tensors: list[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the processes that `torchrun` or `accelerate launch` started, or be the only one.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: ``cuda`` without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: device must be there, got cuda without a CUDA device")
    kind = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    place = torch.device("cpu" if kind == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if kind == "cuda":
        torch.cuda.set_device(place)
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ours:
        dist.init_process_group("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        if dist.is_initialized():
            yield Group(dist.get_rank(), dist.get_world_size(), place)
        else:
            yield Group(0, 1, place)
    finally:
        if ours:
            dist.destroy_process_group()


def spread(model: nn.Module, group: Group, parallel: str) -> nn.Module:
    """Return what to call in the place of ``model``, so that the processes share the work of its gradients.

    ``ddp`` keeps a copy of the parameters in each process. ``fsdp`` (FSDP2) turns ``model``'s own parameters into
    DTensors, each process holding a part: expert layers, projector and a language model's layers are gathered one at
    a time, the rest together, for the trunk's fused plan reads its blocks' parameters from outside of them.
    """
    if group.world == 1:
        return model
    if parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard  # slow to import

        for module in _units(model):
            fully_shard(module, shard_placement_fn=shard_placement)
        fully_shard(model, shard_placement_fn=shard_placement)
        return model
    ids = [group.device.index] if group.device.type == "cuda" else None
    # Some architectures have parameters that a forward does not use, such as DINOv2's mask token.
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def full_state(model: nn.Module, keep: bool, without: Collection[str] = ()) -> dict[str, Tensor]:
    """The model's tensors on the CPU, whole; every process must call this, and gets an empty one without ``keep``."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name in without:
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.detach().cpu()
    return found


def _units(model: nn.Module) -> list[nn.Module]:
    tower = find_tower(model)
    units = [*tower.experts, *([tower.projector] if tower.projector is not None else [])]
    language = getattr(model, "language", None)
    layers = set(getattr(language, "_no_split_modules", None) or ())
    if language is not None:
        units += [m for m in language.modules() if type(m).__name__ in layers]
    return units
