"""The shim: a file of code beside the weights, by which ``trust_remote_code=True`` loads a mixpertized model.

Transformers' Auto classes look into ``auto_map`` of the configuration for code in the model's directory. The shim is
that code: a few lines that fetch the loading class from this package. So a program that never heard of this package,
``transformers serve`` for one, loads the model wherever the package is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

MODULE = "modeling_mixpert"
FILE = f"{MODULE}.py"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")  # serve asks the second

_SOURCE = '''\
"""Loads this model, which has experts inside, when trust_remote_code=True. Needs the package mixpert-kernels."""

from mixpert_kernels.hf.mllm.saving import loaded_class

{name} = loaded_class("{name}")
'''


class Saved(nn.Module):
    """The mixin of a mixpertized model that is saved: its directory loads by itself."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        path, name = Path(save_directory), type(self).__name__.removeprefix("FSDP")
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and not path.is_file():  # a file is refused by the model's own code
            path.mkdir(parents=True, exist_ok=True)
            (path / FILE).write_text(_SOURCE.format(name=name), encoding="utf-8")
        forget(self.config)
        others = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**others, **dict.fromkeys(auto_classes(self), f"{MODULE}.{name}")}
        return super().save_pretrained(save_directory, *args, **kwargs)


def auto_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the Auto classes that make such a model."""
    return AUTO_CLASSES if model.base_model is not model else ("AutoModel",)


def forget(config: PreTrainedConfig) -> None:
    """Take the shim out of ``auto_map``."""
    found = getattr(config, "auto_map", None) or {}
    others = {name: place for name, place in found.items() if not _is_shim(place)}
    if others:
        config.auto_map = others
    elif hasattr(config, "auto_map"):
        del config.auto_map


def _is_shim(place: Any) -> bool:
    return isinstance(place, str) and place.rpartition("--")[2].startswith(f"{MODULE}.")
