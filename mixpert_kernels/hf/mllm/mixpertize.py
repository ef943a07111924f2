"""mixpertize: a transformers vision-language model with experts in its vision tower and projector, in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mixpert_kernels.modules import Router

from . import blocks, log, scope, shim
from .families import Mllm, blocks_of, check_packed, feature_layers, mllm_of, to_host
from .settings import CALL, Settings


def mixpertize(
    model: PreTrainedModel,
    num_experts: int = 4,
    expert_layers: int = 2,
    *,
    routing: str = "score_difference",
    tau: float = 0.5,
    delta: float = 0.1,
    against: str = "runner_up",
    router_hidden: int | None = None,
    expert_names: list[str] | None = None,
) -> PreTrainedModel:
    """Give a vision-language model E experts for its images: clones of its last vision blocks and its projector.

    The model is changed in place: it stays the same object of the same class name, with the same parameter names, and
    is called, generates, trains and saves as before. The blocks' and the projector's parameters have E rows, and
    ``mixpert_router`` is new. Until the experts are trained, every route gives what the model gave.

    Args:
        model: LLaVA-1.5, VipLLaVA, LLaVA-NeXT, LLaVA-OneVision, PaliGemma, Gemma 3, InternVL, Idefics3, SmolVLM,
            Qwen2-VL or Qwen2.5-VL, as ``...ForConditionalGeneration`` or the model below it.
        num_experts: E. Expert 0 is the versatile one.
        expert_layers: n, how many of the last blocks that feed the feature are cloned.
        routing: ``direct``, ``score_threshold`` or ``score_difference``.
        tau: threshold of ``score_threshold``, 0..1.
        delta: threshold of ``score_difference``, 0..1.
        against: the reference score of ``score_difference``: ``runner_up`` or ``versatile``.
        router_hidden: width of the router's hidden layer; None for a linear router.
        expert_names: E names, for people; ``unmixpertize`` takes them too.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument is out of its range, the model is not of a known family or has experts already, or a
            leaf cannot be cloned; ``model`` is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{CALL}: model must be a transformers model, got {type(model).__name__}")
    if hasattr(model.base_model, "mixpert_router"):
        raise ValueError(f"{CALL}: model must have no experts yet, got a mixpertized model")
    settings = Settings(
        num_experts, expert_layers, routing, tau, delta, against, router_hidden, expert_names
    )
    build(model, settings)
    return model


def build(model: PreTrainedModel, settings: Settings) -> None:
    """Give ``model`` its experts and router, and ``config.mixpert``."""
    family, owner = mllm_of(model.config), model.base_model
    tower, projector = owner.get_submodule(family.tower), owner.get_submodule(family.projector)
    every = list(blocks_of(tower, family))
    layers = feature_layers(owner.config, family, len(every))
    settings.check(layers)
    _check_vision_side(CALL, model)
    experts = every[layers - settings.expert_layers : layers]
    swaps = [(block, blocks.ExpertLayer) for block in experts]
    swaps.append((projector, blocks.ExpertProjector))
    templates = [blocks.template_of(module, settings.num_experts) for module, _ in swaps]

    like = next(experts[0].parameters())
    width = getattr(owner.config.vision_config, family.width)
    router = Router(width, settings.num_experts, settings.router_hidden)
    for (module, mixin), template in zip(swaps, templates, strict=True):
        blocks.give_experts(module, mixin, template, settings.num_experts)
    for block in every:
        if block not in experts:
            blocks.share(block)
    tower.__class__ = blocks.subclass(type(tower), _tower_class(type(tower), family))
    tower.mixpert_owner = (owner,)
    owner.mixpert_router = router.to(like.device, like.dtype)
    owner.mixpert_settings = settings
    owner.__class__ = blocks.subclass(type(owner), _owner_class(type(owner), family))
    if model is not owner:
        model.__class__ = blocks.subclass(type(model), _head_class(type(model)))
    for module in (owner, model):  # device_map="auto" keeps a projector's leaves with its routing
        module._no_split_modules = {*(module._no_split_modules or ()), type(projector).__name__}
    model.config.mixpert = settings.as_dict()


def unmixpertize(model: PreTrainedModel, expert: int | str = 0) -> PreTrainedModel:
    """Turn a mixpertized model back into a plain one, in place, with the parameters of one expert.

    Args:
        model: made by ``mixpertize``.
        expert: its number, or its name among ``expert_names``.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no experts, or not this one.
    """
    settings = settings_of("unmixpertize", model)
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise ValueError(f"unmixpertize: model must be taken out of its {kind} first, got {kind}")
    _check_vision_side("unmixpertize", model)
    names = settings.expert_names or []
    number = names.index(expert) if expert in names else expert
    if type(number) is not int or not 0 <= number < settings.num_experts:
        known = f"lie in 0..{settings.num_experts - 1}" + (f" or be of {names}" if names else "")
        raise ValueError(f"unmixpertize: expert must {known}, got {expert}")
    family, owner = mllm_of(model.config), model.base_model
    tower = owner.get_submodule(family.tower)
    for module in list(tower.modules()) + [owner.get_submodule(family.projector)]:
        if isinstance(module, blocks.Expert):
            blocks.take_experts(module, number)
        elif isinstance(module, blocks.TrunkLayer):
            blocks.unshare(module)
    del owner.mixpert_router, owner.mixpert_settings, tower.mixpert_owner
    for module in (tower, owner, model):
        module.__class__ = blocks.plain_class(module)
    del model.config.mixpert
    shim.forget(model.config)
    return model


def _check_vision_side(caller: str, model: nn.Module) -> None:
    """Raise ValueError where quantised, adapted or hooked: hooks hold methods of the classes that modules had."""
    family, owner = mllm_of(model.config), model.base_model
    sides = [owner.get_submodule(path) for path in (family.tower, family.projector)]
    for module in (model, owner, *(m for side in sides for m in side.modules())):
        if "forward" in module.__dict__:
            raise ValueError(
                f"{caller}: model must not be dispatched to devices or hooked by accelerate, got a hooked "
                f"{type(module).__name__}: load it without device_map, and dispatch it afterwards"
            )
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{caller}: model must have no adapter in its vision side, got a {type(module).__name__}: "
                "merge_and_unload() first, and adapt it afterwards with lora_config"
            )
        if any(not p.is_floating_point() for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{caller}: model must have a vision side that is not quantised, got a {type(module).__name__}: "
                f"llm_int8_skip_modules=['lm_head', '.*{family.tower}', '.*{family.projector}'] spares it"
            )


def owner_of(caller: str, model: nn.Module) -> nn.Module:
    """Return the module of a mixpertized model that has the tower and the router.

    ``model`` may be inside others, such as PEFT's, DDP's or torch.compile's.

    Raises:
        ValueError: there is none, or there are several.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    owners = [module for module in modules if "mixpert_settings" in module.__dict__]
    if len(owners) != 1:
        found = f"{len(owners)} in a" if owners else "a plain"
        raise ValueError(
            f"{caller}: model must be a mixpertized model, got {found} {type(model).__name__}"
        )
    return owners[0]


def settings_of(caller: str, model: nn.Module) -> Settings:
    """Return the settings of a mixpertized model; ValueError for any other."""
    return owner_of(caller, model).mixpert_settings


@functools.cache
def _tower_class(plain: type, family: Mllm) -> type:
    """The mixin of a vision tower: called by itself, it routes each tile as an image."""
    names = list(inspect.signature(plain.forward).parameters)[1:]
    find = family.images["image"] if family.packed else None

    class Tower(nn.Module):
        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if scope.is_open():
                return plain.forward(self, *args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            if family.packed:
                check_packed(given)
            alone = scope.Scope(self.mixpert_owner[0], "image", find, given, "first")
            with scope.pushed("scopes", alone):
                return plain.forward(self, *args, **kwargs)

    return Tower


@functools.cache
def _owner_class(plain: type, family: Mllm) -> type:
    """The mixin of the module that has the tower: opens the scope, and knows the prompt it is run with."""

    class Owner(shim.Saved):
        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs.get("input_ids")
            with scope.pushed("prompts", (self, prompt)):
                return plain.forward(self, *args, **kwargs)

    for modality in family.images:
        name = f"get_{modality}_features"
        setattr(Owner, name, _in_scope(getattr(plain, name), modality, family))
    return Owner


def _in_scope(features: Callable, modality: str, family: Mllm) -> Callable:
    _, *parameters = inspect.signature(features).parameters.values()
    names = [p.name for p in parameters]
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    find = family.images[modality]

    @functools.wraps(features)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def once(name: str, value: Any) -> Any:
            return to_host(value) if name in family.host else value

        args = tuple(once(name, value) for name, value in zip(names, args, strict=False))
        kwargs = {name: once(name, value) for name, value in kwargs.items()}
        given = dict(zip(names, args, strict=False)) | kwargs
        if family.packed:
            check_packed(given)

        opened = scope.Scope(self, modality, find, given, family.base)
        if family.host and given.keys() >= needed:  # a compiled tower could not read them
            opened.found = find(self, given, None)
        with scope.pushed("scopes", opened):
            return features(self, *args, **kwargs)

    return run


@functools.cache
def _head_class(plain: type) -> type:
    """The mixin of the model that generates: the features that it encodes beforehand are of this prompt."""

    class Head(shim.Saved):
        def _maybe_prepare_encoder_kwargs_for_generation(
            self, inputs_tensor: torch.Tensor, model_kwargs: dict, *args: Any, **kwargs: Any
        ) -> dict:
            ids = None if inputs_tensor.is_floating_point() else inputs_tensor
            with scope.pushed("prompts", (self.base_model, ids)):
                return plain._maybe_prepare_encoder_kwargs_for_generation(
                    self, inputs_tensor, model_kwargs, *args, **kwargs
                )

        @functools.wraps(plain.generate)
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            records = scope.Records()
            with scope.pushed("records", (self.base_model, records)):
                output = plain.generate(self, *args, **kwargs)
            log.routes(records, self.base_model.mixpert_settings)
            if isinstance(output, ModelOutput):
                output.router = records
            return output

    return Head
