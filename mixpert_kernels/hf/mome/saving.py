"""Saving and loading: one directory with what was added, and the LLM and the encoders whole or by reference.

``config.json`` says what the model is made of and where the parts are, ``model.safetensors`` (or shards of it) holds
what ``build`` added. ``llm/``, ``encoders/<branch>/`` and ``sentence_encoder/`` are transformers' own checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixpert_kernels.hf.checkpoint import CONFIG, INDEX, WEIGHTS, write_whole
from mixpert_kernels.hf.loading import directory_of, one_line, quiet
from mixpert_kernels.modules.mole import MixtureOfLanguageExperts

from .build import build, load_llm
from .encoders import Encoder, load_encoder
from .model import MomeForConditionalGeneration
from .processor import ImageProcessor, load_image_processor
from .sentence import Embed, SentenceEncoder

TYPE, FORMAT = "mome", 1
PARTS = ("llm", "encoders", "sentence_encoder", "processors", "tokenizer")  # directories


def save(
    model: MomeForConditionalGeneration,
    directory: Path | str,
    *,
    reference: bool | Collection[str] = False,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
) -> None:
    """Save a model, all or nothing: an old one in ``directory`` is only replaced by a complete one.

    Args:
        model: to be saved. A sentence encoder that is a function, an encoder that is no transformers model and image
            processors without ``save_pretrained`` are left out, and given to ``load`` again.
        directory: is made.
        reference: True, or some of ``llm``, the branches' names and ``sentence_encoder``: of these only the directory
            they were built from is noted. The LLM's parameters that were unfrozen are saved all the same; what else
            was changed in it is not.
        max_shard_size: of one weight file.
        tokenizer: saved to ``tokenizer/`` where one is given.

    Raises:
        ValueError: a part is to be referred to and came from no directory, or from one in ``directory``; or the LLM is
            one that cannot be saved whole, being wrapped or quantised.
    """
    target = Path(directory).resolve()
    referred = _referred(model, target, reference)
    unfrozen = {} if "llm" not in referred else model.trainable().get("other", {})
    config = {
        "model_type": TYPE,
        "mixpert_format": FORMAT,
        "experts": model.experts,
        "hidden": model.layers[0].hidden if model.experts else None,
        "mix": model.move.mix,
        "size": next(iter(model.move.branches.values())).size,
        "sentence_width": model.move.sentence_width,
        "image_token_id": model.image_token_id,
        "branches": model.options,
        "unfrozen": sorted(unfrozen),
    }

    def write(draft: Path) -> None:
        config["llm"] = referred.get("llm") or _save_llm(model.llm, draft, max_shard_size)
        config["encoders"] = {
            name: referred.get(name) or _save_encoder(branch.encoder, draft, f"encoders/{name}")
            for name, branch in model.move.branches.items()
        }
        config["sentence_encoder"] = referred.get("sentence_encoder") or _save_encoder(
            model.sentence_encoder, draft, "sentence_encoder"
        )
        config["processors"] = {
            name: _save_pretrained(processor, draft, f"processors/{name}")
            for name, processor in (model.processor.processors if model.processor else {}).items()
            if hasattr(processor, "save_pretrained")
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(draft / "tokenizer")
        state = {name: p.detach() for name, p in (model.own_parameters() | unfrozen).items()}
        _save_tensors(state, draft, max_shard_size)
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    with quiet():
        write_whole(target, write, PARTS)


def load(
    directory: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    llm: PreTrainedModel | None = None,
    encoders: Mapping[str, nn.Module | Path | str] | None = None,
    sentence_encoder: Embed | Path | str | None = None,
    processors: Mapping[str, ImageProcessor] | None = None,
) -> MomeForConditionalGeneration:
    """Load a saved model, in evaluation mode; on the CPU its bits are those that were saved.

    Args:
        directory: as ``save`` wrote it.
        device: to which the model is moved.
        dtype: of all but the sentence encoder; ``"auto"``: as saved.
        llm: in the place of the saved one; a plain model, changed in place.
        encoders: the same for encoders, by branch. Needed where one was left out.
        sentence_encoder: the same.
        processors: the same for image processors.

    Raises:
        ValueError: the directory is missing or holds no such model, or one of another format; a part is missing; the
            number of adapters is not that of the weights; or a parameter is missing, unexpected or of another shape.
            The message names it.
    """
    if isinstance(dtype, str) and dtype != "auto":
        raise ValueError(f'load: dtype must be a torch.dtype or "auto", got {dtype}')
    directory, config = read_config("load", directory)
    state = read_tensors("load", directory)
    _check_experts(directory, config, state)
    given = {*(encoders or {}), *([] if llm is None else ["llm"])}
    if llm is None:
        llm = load_llm(_place("load", directory, config["llm"], "llm"), dtype)
    found = {
        name: load_encoder(_place("load", directory, part, f"encoder {name!r}"), dtype)
        if name not in given
        else None
        for name, part in config["encoders"].items()
    } | dict(encoders or {})
    if sentence_encoder is None and config["sentence_encoder"]:
        sentence_encoder = _place("load", directory, config["sentence_encoder"], "sentence_encoder")
    readers = {
        name: _reader(_place("load", directory, part, f"image processor of {name!r}"))
        for name, part in config["processors"].items()
        if name not in (processors or {})
    }
    model = build(
        llm,
        found,
        sentence_encoder=sentence_encoder,
        experts=config["experts"],
        hidden=config["hidden"] or 1,
        mix=config["mix"],
        branches=config["branches"],
        size=config["size"],
        sentence_width=config["sentence_width"],
        image_token_id=config["image_token_id"],
        processors=readers | dict(processors or {}),
    )
    for name, part in {"llm": config["llm"], **config["encoders"]}.items():
        if name not in given:
            model.sources[name] = directory / part
    _fill(model, state, config["unfrozen"], directory, None if isinstance(dtype, str) else dtype)
    return model if device is None else model.to(device)


def read_config(caller: str, directory: Path | str) -> tuple[Path, dict[str, Any]]:
    """The configuration of a saved model.

    Raises:
        ValueError: the directory is missing or holds no such model, or one of another format.
    """
    directory = directory_of(caller, directory)
    with one_line(caller, directory / CONFIG, "a saved MoME model's"):
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != TYPE:
            got = config.get("model_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"model_type {got}")
        if config.get("mixpert_format") != FORMAT:
            raise ValueError(
                f"mixpert_format {config.get('mixpert_format')}, not {FORMAT}: another version of mixpert_kernels "
                "wrote it"
            )
    return directory, config


def is_saved(directory: Path) -> bool:
    """Whether a directory holds a saved MoME model, of whatever format."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == TYPE


def read_tensors(
    caller: str, directory: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors that were added to the LLM and the encoders, or those ``wanted``, on the CPU.

    Raises:
        ValueError: a weight file is missing or damaged.
    """
    files, tensors = [WEIGHTS], dict[str, Tensor]()
    with one_line(caller, directory, "a whole saved MoME model"):
        if (directory / INDEX).is_file():
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        for name in files:
            if not (directory / name).is_file():
                raise ValueError(f"no {name}")
            with safe_open(directory / name, framework="pt") as file:
                names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118, no dict
                tensors |= {name: file.get_tensor(name) for name in names}
    return tensors


def fill(
    caller: str,
    source: Path | str,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Give parameters the values of tensors of the same names, and their dtype or the one that is given.

    Raises:
        ValueError: a name is missing or unexpected, or a shape another; no parameter is changed.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in state and state[name].shape != p.shape
    ]
    for fault, found in (
        ("missing keys", parameters.keys() - state.keys()),
        ("unexpected keys", state.keys() - parameters.keys()),
        ("mismatched keys", shapes),
    ):
        if found:
            raise ValueError(
                f"{caller}: {source} must hold exactly the model's parameters, got {fault}: "
                f"{', '.join(sorted(found)[:3])}"
            )
    for name, parameter in parameters.items():
        parameter.data = state[name].to(parameter.device, dtype or state[name].dtype)


def _fill(
    model: MomeForConditionalGeneration,
    state: dict[str, Tensor],
    unfrozen: list[str],
    directory: Path,
    dtype: torch.dtype | None,
) -> None:
    named = dict(model.named_parameters())
    unknown = [name for name in unfrozen if name not in named]
    if unknown:
        raise ValueError(
            f"load: unfrozen in {directory / CONFIG} must name the LLM's parameters, got {unknown[0]}"
        )
    more = {name: named[name].requires_grad_() for name in unfrozen}
    fill("load", directory, model.own_parameters() | more, state, dtype)


def _check_experts(directory: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    held = {len(t) for name, t in state.items() if name.endswith(".mlp.down") and t.ndim == 3}
    if held and held != {config["experts"]}:
        raise ValueError(
            f"load: experts in {directory / CONFIG} must be the number of adapters in the weights, "
            f"{', '.join(map(str, sorted(held)))}, got {config['experts']}"
        )


def _referred(
    model: MomeForConditionalGeneration, target: Path, reference: bool | Collection[str]
) -> dict[str, str]:
    """By part, the directory to be noted for it."""
    known = ["llm", *model.branches, "sentence_encoder"]
    if isinstance(reference, bool):
        names: Collection[str] = [n for n in known if n in model.sources] if reference else []
    else:
        names = [reference] if isinstance(reference, str) else reference
    for name in names:
        if name not in known:
            raise ValueError(f"save: reference must be of {', '.join(known)}, got {name}")
        if name not in model.sources:
            raise ValueError(
                f"save: reference must name parts that were built from a directory, got {name}"
            )
        if target in (model.sources[name].resolve(), *model.sources[name].resolve().parents):
            raise ValueError(
                f"save: reference must be to a directory outside {target}, got {model.sources[name]}"
            )
    return {name: str(model.sources[name].resolve()) for name in names}


def _place(caller: str, directory: Path, part: str | None, what: str) -> Path:
    if part is None:
        raise ValueError(
            f"{caller}: {what} must be given, got None: it was not saved, being no transformers model"
        )
    place = directory / part  # an absolute one is a reference
    if not place.is_dir():
        raise ValueError(f"{caller}: {what} must be in {place}, got no such directory")
    return place


def _reader(place: Path) -> ImageProcessor:
    reader = load_image_processor(place)
    if reader is None:
        raise ValueError(f"load: image processor must be in {place}, got none")
    return reader


def _save_llm(llm: Any, draft: Path, max_shard_size: int | str) -> str:
    if not isinstance(llm, PreTrainedModel):
        raise ValueError(
            f"save: llm must be a transformers model, got a {type(llm).__name__}: take the model out of it first, as "
            "PEFT's merge_and_unload() does"
        )
    if getattr(llm, "hf_quantizer", None) is not None:
        raise ValueError(
            "save: llm must not be quantised to be saved whole, got a quantised one: "
            'build it from a directory, and save with reference=["llm"]'
        )
    llm.save_pretrained(draft / "llm", state_dict=plain_state(llm), max_shard_size=max_shard_size)
    return "llm"


def plain_state(llm: nn.Module) -> dict[str, Tensor]:
    """The LLM's state without its language experts, under the names that it had before them."""
    state = llm.state_dict()
    for name, module in llm.named_modules():
        if isinstance(module, MixtureOfLanguageExperts):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                tensor = state.pop(key)
                if key.startswith(f"{name}.ffn."):
                    state[name + key.removeprefix(f"{name}.ffn")] = tensor
    return state


def _save_encoder(encoder: Any, draft: Path, part: str) -> str | None:
    if isinstance(encoder, SentenceEncoder):
        return _save_pretrained(encoder, draft, part)
    return _save_pretrained(encoder.model, draft, part) if isinstance(encoder, Encoder) else None


def _save_pretrained(saved: Any, draft: Path, part: str) -> str:
    saved.save_pretrained(draft / part)
    return part


def _save_tensors(state: dict[str, Tensor], draft: Path, max_shard_size: int | str) -> None:
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: state[name].contiguous() for name in names}
        save_file(shard, draft / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
