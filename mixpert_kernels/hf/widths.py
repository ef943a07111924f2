"""Which ops a tower calls, at which widths: found by running it on tensors without values, so no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from mixpert_kernels.tuning.calls import OPS, Call

from .configuration import MixpertVisionConfig
from .loading import ENCODERS, PROJECTORS, directory_of, one_line, quiet, random_siglip
from .tower import FusedMixpertTower


class Sizes(NamedTuple):
    """A SigLIP vision model and its projector Linear(D, P) - GELU - Linear(P, P)."""

    hidden: int  # D
    intermediate: int
    projected: int  # P
    tokens: int  # T of a tile


GEOMETRIES = {
    "base": Sizes(768, 3072, 2048, 196),
    "so400m": Sizes(1152, 4304, 3584, 729),
}


class Workload(NamedTuple):
    """What there is to time."""

    calls: tuple[Call, ...]
    tokens: int
    experts: int


def of_sizes(sizes: Sizes, experts: int, device: str) -> Workload:
    """The calls of a tower of these sizes on a device of this type, ``cpu`` or ``cuda``, which need not be there.

    Raises:
        ValueError: a size is below 1.
    """
    for name, value in (sizes._asdict() | {"experts": experts}).items():
        if value < 1:
            raise ValueError(f"tune: {name} must be at least 1, got {value}")
    with torch.device("meta"):
        vision = random_siglip(
            hidden=sizes.hidden,
            intermediate=sizes.intermediate,
            layers=3,
            heads=1,
            image_size=16,
            patch_size=16,
        )
        first = nn.Linear(sizes.hidden, sizes.projected)
        projector = nn.Sequential(first, nn.GELU(), nn.Linear(sizes.projected, sizes.projected))
        tower = FusedMixpertTower.from_vision_model(vision, projector, num_experts=experts)
    return of_tower(tower, device)._replace(tokens=sizes.tokens)


def of_directory(directory: Path | str, experts: int, device: str) -> Workload:
    """The calls of a saved tower, or of the tower that a transformers vision checkpoint would become.

    Args:
        directory: holds ``config.json``; nothing else is read.
        experts: E where the directory holds no tower yet.
        device: ``cpu`` or ``cuda``, which need not be there.

    Raises:
        ValueError: the directory is missing or holds no vision model.
    """
    directory = directory_of("tune", directory)
    with one_line("tune", directory, "a tower or a transformers vision checkpoint"), quiet():
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            tower = _tower(config, experts)
        return of_tower(tower, device)


def _tower(config: Any, experts: int) -> FusedMixpertTower:
    if isinstance(config, MixpertVisionConfig):
        return FusedMixpertTower(config)
    model = AutoModel.from_config(config)
    vision = next((getattr(model, name) for name in ENCODERS if hasattr(model, name)), model)
    projector = next((getattr(model, name) for name in PROJECTORS if hasattr(model, name)), None)
    return FusedMixpertTower.from_vision_model(vision, projector, num_experts=experts)


def of_tower(tower: FusedMixpertTower, device: str) -> Workload:
    """The calls of a tower, in inference and in training; its parameters are replaced by ones without values."""
    seen = _Watch()
    size = tower.config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(tower.config.vision_config, "num_channels", 3)
    tokens = 0
    with FakeTensorMode():
        _without_values(tower, device)
        for training in (False, True):
            tower.train(training)
            with torch.set_grad_enabled(training), seen:
                pixels = torch.empty(1, channels, height, width, device=device)
                x, args, kwargs = tower._run_trunk(pixels, False)
                routing = tower.route(x)
                tower._segment(x, routing, args, kwargs)
                if tower.experts and tower.experts[0].can_route(args, kwargs):
                    router = (tower.router.weights, tower.config.strategy)
                    tower.experts[0].run_routed(x, *router)
                tokens = x.shape[1]
    return Workload(tuple(dict.fromkeys(seen.calls)), tokens, tower.config.num_experts)


def _without_values(module: nn.Module, device: str) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_empty(parameter, device))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _empty(buffer, device)


def _empty(t: Tensor, device: str) -> Tensor:
    dtype = torch.float32 if t.is_floating_point() else t.dtype
    return torch.empty(t.shape, dtype=dtype, device=device)


class _Watch(TorchDispatchMode):
    """Notes the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        space, op = func._schema.name.split("::")
        if space == "mixpert" and op in OPS:
            names = (argument.name for argument in func._schema.arguments)
            self.calls.append(_call(op, dict(zip(names, args, strict=False))))
        return func(*args, **(kwargs or {}))


def _call(op: str, given: dict[str, Any]) -> Call:
    depth = given["x"].shape[2]
    if op == "grouped_layer_norm":
        return Call(op, (depth,))
    if op == "route":
        hidden, weight = given["hidden_weight"], given["weight"]
        return Call(op, (depth, *(() if hidden is None else hidden.shape[:1]), weight.shape[0]))
    act, residual = given["activation"], given.get("residual") is not None
    if op == "grouped_mlp":
        widths = (depth, given["weight1"].shape[1], given["weight2"].shape[1])
        return Call(op, widths, (), act, residual)
    parts = tuple(w.shape[1] for w in given["weights"])
    return Call(op, (depth, sum(parts)), parts, act, residual)
