"""Checkpoints of the original code, by the names of its state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixpert_kernels.hf.loading import one_line
from mixpert_kernels.modules.mole import stack_adapters

from .build import build
from .encoders import Encoder
from .model import MomeForConditionalGeneration

CALLER = "load_original"
BRANCHES = ("clip", "dino", "pix")  # in the order of its router's weights
ADAPTER = ".mlp.adapter."
LAYERS = "llm_model.model.layers."


def load_original(
    model: MomeForConditionalGeneration | Mapping[str, Path | str],
    state: Mapping[str, Tensor] | Path | str,
    *,
    branches: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> MomeForConditionalGeneration:
    """Load what the original code trained: selectors, projections, routers and adapters.

    ``reference_points`` are loaded as stored: the original stacks its initial grid as (row, column) and reads points as
    (x, y), which is what they mean here too.

    Args:
        model: of three branches, changed in place; or directories, by ``llm``, ``clip``, ``dino``, ``pix`` and, where
            there is one, ``sentence_encoder``, from which it is built at the sizes of the checkpoint, with 8 heads.
        state: its state dict, or a file of it: safetensors, or torch's, itself or under ``model``.
        branches: by the original's names, ``clip``, ``dino`` and ``pix``, those of the model; None: by the encoders'
            types. The order of the router's weights is that of the original's names [ours] and is brought to the
            model's.
        ignore: beginnings of names that are left out, such as an encoder's that the checkpoint repeats.

    Returns:
        The model. Its LLM's other parameters are loaded too where the checkpoint has them.

    Raises:
        ValueError: a name is unknown or missing, a shape or the number of adapters is not the model's; then no
            parameter is changed.
    """
    given = _read(state) if isinstance(state, str | Path) else state
    left = {name: t for name, t in given.items() if not name.startswith(tuple(ignore))}
    if not isinstance(model, MomeForConditionalGeneration):
        model = _built(model, left)
    names = _branches(model, branches)
    targets = _vision_targets(model, names)
    values = {theirs: left.pop(theirs) for theirs in targets if theirs in left}
    _check(targets.keys() - values.keys(), "missing keys")
    router = model.move.router
    if router is not None:
        order = [BRANCHES.index(theirs) for theirs in _in_order(model, names)]
        for part in ("weight", "bias"):
            last = f"move_router.router.2.{part}"
            _check_shape(last, values[last], targets[last])
            values[last] = values[last][order]
    adapters: dict[str, Tensor] = {}
    for theirs, parameter, value in _adapters(model, left):
        targets[theirs], adapters[theirs] = parameter, value
    values |= adapters
    rest = _llm_parameters(model)
    for theirs in [name for name in left if name in rest]:
        targets[theirs], values[theirs] = rest[theirs], left.pop(theirs)
    _check(left, "unexpected keys")
    for theirs, parameter in targets.items():
        _check_shape(theirs, values[theirs], parameter)
    with torch.no_grad():
        for theirs, parameter in targets.items():
            parameter.copy_(values[theirs])
    return model


def _vision_targets(
    model: MomeForConditionalGeneration, names: Mapping[str, str]
) -> dict[str, nn.Parameter]:
    """By the original's names, the parameters of the vision experts."""
    found: dict[str, nn.Parameter] = {}
    for theirs, ours in names.items():
        branch = model.move.branches[ours]
        places = {"clip_ln": branch.norm, "clip_proj": branch.proj}
        if theirs != "clip":
            places = {f"{theirs}_selector": branch.transform, f"{theirs}_llm_proj": branch.proj}
        for prefix, module in places.items():
            if module is None:
                raise ValueError(
                    f"{CALLER}: branch {ours!r} must have a place for {prefix}, got transform {branch.how!r}"
                )
            found |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
    if model.move.router is not None:
        parameters = model.move.router.named_parameters()
        found |= {f"move_router.router.{name}": p for name, p in parameters}
    return found


def _adapters(
    model: MomeForConditionalGeneration, left: dict[str, Tensor]
) -> list[tuple[str, nn.Parameter, Tensor]]:
    """The adapters' parameters and values, which are taken out of ``left``, by a name for errors."""
    of_layer: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in left if ADAPTER in name]:
        layer, _, rest = name.partition(ADAPTER)
        of_layer.setdefault(layer, {})[rest] = left.pop(name)
    wanted = [f"{LAYERS}{number}" for number in range(len(model.layers))]
    _check([f"{n}{ADAPTER}*" for n in wanted if n not in of_layer], "missing keys")
    found = []
    counts = {_count(adapters) for adapters in of_layer.values()}
    if counts - {model.experts}:
        raise ValueError(
            f"{CALLER}: state must have the model's {model.experts} adapters a layer, got "
            f"{', '.join(map(str, sorted(counts)))}"
        )
    _check([f"{n}{ADAPTER}*" for n in of_layer if n not in wanted], "unexpected keys")
    for name, mole in zip(wanted, model.layers, strict=True):
        with one_line(CALLER, f"{name}{ADAPTER}*", "the original's adapters and router"):
            stacked = stack_adapters(of_layer[name])
        own = {key: p for key, p in mole.named_parameters() if not key.startswith("ffn.")}
        keys = own.keys() ^ stacked.keys()
        _check([f"{name}{ADAPTER}({key})" for key in keys & own.keys()], "missing keys")
        _check([f"{name}{ADAPTER}({key})" for key in keys - own.keys()], "unexpected keys")
        found += [(f"{name}{ADAPTER}({key})", p, stacked[key]) for key, p in own.items()]
    return found


def _count(adapters: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in adapters if name.startswith("adapters.")})


def _llm_parameters(model: MomeForConditionalGeneration) -> dict[str, nn.Parameter]:
    """The LLM's own parameters, by the names they had in it before the adapters."""
    own = model.own_parameters().keys()
    named = model.named_parameters()
    return {
        "llm_model." + name.removeprefix("llm.").replace(".mlp.ffn.", ".mlp."): p
        for name, p in named
        if name.startswith("llm.") and name not in own
    }


def _branches(
    model: MomeForConditionalGeneration, given: Mapping[str, str] | None
) -> dict[str, str]:
    """The model's branches by the original's names."""
    if given is None:
        kinds = [(_kind(branch.encoder), name) for name, branch in model.move.branches.items()]
        given = {kind: name for kind, name in kinds if kind}
        if len(given) != len(kinds):
            given = {}
    if given.keys() != set(BRANCHES) or set(given.values()) != set(model.branches):
        raise ValueError(
            f"{CALLER}: branches must tell which of the model's are {', '.join(BRANCHES)}, got "
            f"{dict(given) or 'None'} for {', '.join(model.branches)}"
        )
    return {name: given[name] for name in BRANCHES}


def _kind(encoder: nn.Module) -> str | None:
    if not isinstance(encoder, Encoder):
        return None
    if encoder.kind.packed:
        return "pix"
    return "dino" if encoder.kind.model.startswith("Dinov2") else "clip"


def _in_order(model: MomeForConditionalGeneration, names: Mapping[str, str]) -> list[str]:
    theirs = {ours: theirs for theirs, ours in names.items()}
    return [theirs[ours] for ours in model.branches]


def _built(
    directories: Mapping[str, Path | str], state: Mapping[str, Tensor]
) -> MomeForConditionalGeneration:
    known = {"llm", *BRANCHES}
    fits = isinstance(directories, Mapping)
    if not fits or not known <= directories.keys() <= known | {"sentence_encoder"}:
        got = ", ".join(directories) if fits else type(directories).__name__
        raise ValueError(
            f"{CALLER}: model must be a model, or directories of llm, {', '.join(BRANCHES)} and perhaps "
            f"sentence_encoder, got {got}"
        )
    down = f"{LAYERS}0{ADAPTER}adapters.0.down_proj.weight"
    first = f"{LAYERS}0{ADAPTER}"
    sizes: dict[str, Any] = {
        "experts": _count(
            {n.removeprefix(first): t for n, t in state.items() if n.startswith(first)}
        ),
        "hidden": len(state[down]) if down in state else 1,
    }
    router = state.get("move_router.router.0.weight")
    if router is not None:
        sizes["sentence_width"] = router.shape[1]
    return build(
        directories["llm"],
        {name: directories[name] for name in BRANCHES},
        sentence_encoder=directories.get("sentence_encoder"),
        branches={
            "clip": {"transform": "none", "norm": True, "cls": True},
            **{name: _selector(name, state) for name in ("dino", "pix")},
        },
        **sizes,
    )


def _selector(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a branch's transform in the checkpoint."""
    prefix = f"{name}_selector.layers."
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    options: dict[str, Any] = {"transform": "deformable", "norm": False}
    if numbers:
        options["layers"] = len(numbers)
    fc1 = state.get(f"{prefix}0.fc1.weight")
    return options if fc1 is None else options | {"ffn": len(fc1)}


def _read(path: Path | str) -> Mapping[str, Tensor]:
    path = Path(path)
    with one_line(CALLER, path, "a file of the original's state dict"):
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("model", found)
        if not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"no tensors alone but {', '.join(map(str, list(found)[:3]))}")
    return found


def _check(names: Any, fault: str) -> None:
    if names:
        raise ValueError(
            f"{CALLER}: state must hold exactly the model's parameters, got {fault}: "
            f"{', '.join(sorted(names)[:3])}"
        )


def _check_shape(name: str, value: Tensor, parameter: nn.Parameter) -> None:
    if value.shape != parameter.shape:
        raise ValueError(
            f"{CALLER}: {name} must have shape {tuple(parameter.shape)}, got {tuple(value.shape)}"
        )
