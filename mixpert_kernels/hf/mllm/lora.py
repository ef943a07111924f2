"""LoRA of the language model beside experts, by PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .families import mllm_of
from .mixpertize import owner_of

if TYPE_CHECKING:
    from peft import LoraConfig

CALL = "lora_config"


def lora_config(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear", **options: Any
) -> LoraConfig:
    """Return PEFT's LoraConfig for the language model of a mixpertized model, and for nothing else.

    PEFT matches names from the end, so that ``q_proj`` is also a leaf with experts, which it refuses, and a leaf of the
    vision tower's other blocks. Here the tower, the projector and the router stand in ``exclude_modules``.

    PEFT freezes what it does not adapt, experts and router too. ``modules_to_save=["mixpert_router"]`` trains the
    router and saves it with the adapter; ``["multi_modal_projector"]`` does so with the projector of all experts.

    Args:
        model: a mixpertized model, before ``get_peft_model`` or after.
        target_modules: names of layers, or the ends of them, as a list; a regex of whole names, as a string; or
            ``all-linear``, every linear layer of the language model but its head.
        options: further arguments of LoraConfig.

    Raises:
        ValueError: the model has no experts, or one of ``target_modules`` matches nothing in the language model.
        RuntimeError: peft is not installed.

    Example:
        >>> config = lora_config(model, ["q_proj", "v_proj"], r=16)  # doctest: +SKIP
        >>> tuned = peft.get_peft_model(model, config)  # doctest: +SKIP
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError:
        raise RuntimeError(
            f"{CALL}: peft must be installed, which the extra 'lora' does: pip install -e \".[lora]\""
        ) from None

    owner = owner_of(CALL, model)
    excluded = _excluded(owner, options.pop("exclude_modules", None))
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not names:
        raise ValueError(f"{CALL}: target_modules must not be empty, got {target_modules}")
    keys = [name for name, _ in model.named_modules()]
    for name in names:
        if name == "all-linear":
            continue
        wanted = name if isinstance(target_modules, str) else [name]
        probe = LoraConfig(target_modules=wanted, exclude_modules=excluded)
        if not any(check_target_module_exists(probe, key) for key in keys):
            kind = "a regex of whole names" if isinstance(target_modules, str) else "names"
            raise ValueError(
                f"{CALL}: target_modules must be {kind} of layers in the language model, got {name}"
            )
    targets = target_modules if isinstance(target_modules, str) else names
    return LoraConfig(target_modules=targets, exclude_modules=excluded, **options)


def _excluded(owner: nn.Module, more: str | Sequence[str] | None) -> str:
    """A regex of the vision side's modules, and of those that the caller excludes: a regex, or ends of names."""
    family = mllm_of(owner.config)
    paths = [re.escape(p) for p in (family.tower, family.projector, "mixpert_router")]
    regex = rf"(.*\.)?({'|'.join(paths)})(\..*)?"
    if isinstance(more, str):
        return f"{regex}|{more}"
    ends = "|".join(map(re.escape, more or ()))
    return rf"{regex}|(.*\.)?({ends})" if ends else regex
