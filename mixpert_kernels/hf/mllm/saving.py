"""Loading: transformers' Auto classes build the mixpertized model where a configuration says it is one.

They are told of a subclass of each family's model, under the same name: by importing this package, or by the shim in
the checkpoint's directory. Where ``config.mixpert`` is missing it hands over to the plain class, so other checkpoints
load as they did.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mixpert_kernels.hf.loading import directory_of, one_line

from .blocks import subclass
from .families import FAMILIES, mllm_of
from .mixpertize import build
from .settings import Settings
from .shim import AUTO_CLASSES


class Loaded(nn.Module):
    """What the Auto classes make of a configuration: an instance is of the plain class, or a mixpertized model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.__class__ = type(self).mixpert_plain
        found = getattr(config, "mixpert", None)
        if found is not None:
            build(self, Settings.of(found))

    @classmethod
    def from_pretrained(cls, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; every parameter of a mixpertized model must be in it, and no other.

        A ``quantization_config`` is followed in the language model; the vision side stays as it is.

        Raises:
            ValueError: a parameter is missing, unexpected or of another shape; the message names it.
        """
        config = kwargs.get("config")
        if config is None:
            config = cls.config_class.from_pretrained(directory)
        if getattr(config, "mixpert", None) is None:
            return cls.mixpert_plain.from_pretrained(directory, *args, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        options = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        if kwargs.get("quantization_config") is not None:
            options["quantization_config"] = _sparing(kwargs["quantization_config"], config)
        model, info = super().from_pretrained(directory, *args, **options)
        refuse_faults("from_pretrained", directory, "mixpertized model", info)
        return (model, info) if wants_info else model


def _sparing(quantization: Any, config: Any) -> Any:
    """``quantization`` without the vision side: experts are no linear layers to a quantizer, and the router is read."""
    family = mllm_of(config)
    spared = [f".*{path}" for path in (family.tower, family.projector, "mixpert_router")]
    quantization = copy.deepcopy(quantization)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, name):
            own = getattr(quantization, name)
            setattr(quantization, name, [*(["lm_head"] if own is None else own), *spared])
    return quantization


def load_plain(directory: Path) -> PreTrainedModel:
    """Load a vision-language model to be mixpertized, in the checkpoint's dtype.

    Raises:
        ValueError: the directory is missing, is no checkpoint of a known family, is a mixpertized model's, or lacks a
            parameter or has one too many.
    """
    caller = "load_plain"
    directory = directory_of(caller, directory)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with one_line(caller, directory, "a transformers vision-language checkpoint"):
        config = AutoConfig.from_pretrained(directory, **local)
        mllm_of(config)
        if getattr(config, "mixpert", None) is not None:
            raise ValueError("it is a mixpertized model already")
        model, info = AutoModelForImageTextToText.from_pretrained(
            directory, dtype="auto", output_loading_info=True, **local
        )
    refuse_faults(caller, directory, "model", info)
    return model.eval()


def refuse_faults(caller: str, directory: Any, kind: str, info: dict[str, Any]) -> None:
    mismatched = {
        name: (list(saved), list(built)) for name, saved, built in info["mismatched_keys"]
    }
    for name, (saved, built) in mismatched.items():
        if name.endswith("mixpert_router.out.bias"):  # (E,)
            raise ValueError(
                f"{caller}: config.mixpert of {directory} must have as many experts as the weights, {saved[0]}, got "
                f"num_experts {built[0]}"
            )
    shapes = [f"{name} {saved} for {built}" for name, (saved, built) in mismatched.items()]
    for fault, found in (
        ("missing keys", info["missing_keys"]),
        ("unexpected keys", info["unexpected_keys"]),
        ("mismatched keys", shapes),
    ):
        if found:
            raise ValueError(
                f"{caller}: {directory} must hold exactly the {kind}'s parameters, got {fault}: "
                f"{', '.join(sorted(found)[:3])}"
            )


def loaded_class(name: str) -> type:
    """The class by which a model whose class in transformers is ``name`` is loaded."""
    return subclass(getattr(transformers, name), Loaded)


def register() -> None:
    """Tell the Auto classes of every family that this version of transformers has."""
    for family in FAMILIES.values():
        if not hasattr(transformers, family.model):
            continue
        base = family.model.replace("ForConditionalGeneration", "Model")
        for auto, name in {**dict.fromkeys(AUTO_CLASSES, family.model), "AutoModel": base}.items():
            if hasattr(transformers, auto):
                made = loaded_class(name)
                getattr(transformers, auto).register(made.config_class, made, exist_ok=True)
