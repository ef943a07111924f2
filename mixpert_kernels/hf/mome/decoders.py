"""Language experts in a transformers decoder: MixtureOfLanguageExperts in the place of each layer's FFN."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixpert_kernels.hf.subclass import plain_class, subclass
from mixpert_kernels.modules.mole import SENTENCE_WIDTH, Instruction, MixtureOfLanguageExperts

REQUEST = "mixpert_request"  # the argument by which a layer hands the request to its own forward


class InstructedLayer(nn.Module):
    """The mixin of a decoder layer with experts: it knows its request by an argument of its forward.

    So a layer that gradient checkpointing runs again in backward, in another thread and when another request is set or
    none, chooses the adapters that it was first run with.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs[REQUEST] = self.mlp.instruction.request
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        instruction = self.mlp.instruction
        request = kwargs.pop(REQUEST, None) or instruction.request
        before = instruction.bind(request)
        try:
            return super().forward(*args, **kwargs)
        finally:
            instruction.bind(before)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickle by the plain class, which has a module to be found in."""
        return _blank, (plain_class(self),), *super().__reduce_ex__(protocol)[2:]


def _blank(plain: type) -> nn.Module:
    made = subclass(plain, InstructedLayer)
    return made.__new__(made)


def add_language_experts(
    llm: PreTrainedModel,
    *,
    experts: int = 4,
    hidden: int = 64,
    sentence_width: int = SENTENCE_WIDTH,
    dtype: torch.dtype | None = None,
) -> Instruction:
    """Put a ``MixtureOfLanguageExperts`` in the place of each decoder layer's ``mlp``, in place.

    Until they are trained the model gives what it gave, bit for bit. It is called, trains and generates as before,
    within ``instruction.given(embedding)`` or after ``instruction.set(embedding)``. The FFN's parameters go by
    ``mlp.ffn.*`` from now on, so what was saved of the plain model is loaded beforehand.

    Args:
        llm: Llama, Qwen2, Mistral, Gemma or another model whose decoder has ``layers`` with an ``mlp`` each, of
            one input (B, T, D) and one output; also inside PEFT's.
        experts: K, one adapter alone for stage 1.
        hidden: H of an adapter.
        sentence_width: S of the embeddings.
        dtype: of the new parameters; None: that of the layer.

    Returns:
        Where a request's instructions are set, also found by ``instruction_of``.

    Raises:
        ValueError: a size is below 1, the decoder is of no known make, or has experts already; ``llm`` is as it was.
    """
    caller = "add_language_experts"
    layers = decoder_layers(caller, llm)
    if any(isinstance(layer.mlp, MixtureOfLanguageExperts) for layer in layers):
        raise ValueError(f"{caller}: llm must have no language experts yet, got some")
    instruction, made = Instruction(), []
    for layer in layers:
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{caller}: llm must not be dispatched to devices or hooked by accelerate, got a hooked "
                f"{type(layer).__name__}: load it without device_map, and dispatch it afterwards"
            )
        like = _like(layer)
        mole = MixtureOfLanguageExperts(
            layer.mlp,
            _width(llm),
            experts=experts,
            hidden=hidden,
            sentence_width=sentence_width,
            instruction=instruction,
            device=like.device,
            dtype=dtype or like.dtype,
        )
        made.append(mole.train(layer.mlp.training))
    for layer, mole in zip(layers, made, strict=True):
        layer.mlp = mole
        layer.__class__ = subclass(type(layer), InstructedLayer)
    return instruction


def remove_language_experts(llm: nn.Module) -> nn.Module:
    """Give each decoder layer its own FFN back, in place, and return ``llm``.

    Raises:
        ValueError: there are no language experts.
    """
    language_experts("remove_language_experts", llm)
    for layer in list(llm.modules()):
        if isinstance(layer, InstructedLayer):
            layer.mlp = layer.mlp.ffn
            layer.__class__ = plain_class(layer)
    return llm


def reclone_language_experts(llm: nn.Module, experts: int = 4) -> None:
    """Make ``experts`` copies of each layer's first adapter, with new routers: from stage 1 to stage 2.

    Raises:
        ValueError: there are no language experts, or ``experts`` is below 1.
    """
    for mole in language_experts("reclone_language_experts", llm):
        mole.reclone(experts)


def language_experts(caller: str, llm: nn.Module) -> list[MixtureOfLanguageExperts]:
    """Return the experts of a model, first layer first.

    Raises:
        ValueError: there are none.
    """
    found = [m for m in llm.modules() if isinstance(m, MixtureOfLanguageExperts)]
    if not found:
        raise ValueError(f"{caller}: llm must have language experts, got a plain {_name(llm)}")
    return found


def instruction_of(llm: nn.Module) -> Instruction:
    """Return where the instructions of a model with language experts are set.

    Raises:
        ValueError: there are no language experts.
    """
    return language_experts("instruction_of", llm)[0].instruction


def decoder_layers(caller: str, llm: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder, each with an FFN named ``mlp``.

    Raises:
        ValueError: there are none; the message names what was looked for.
    """
    decoder = llm.get_decoder() if hasattr(llm, "get_decoder") else llm
    layers = getattr(decoder, "layers", None)
    sought = "a decoder with `layers`, each with an `mlp`, as Llama, Qwen2, Mistral and Gemma have"
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"{caller}: llm must have {sought}, got {_name(decoder)} without layers")
    for number, layer in enumerate(layers):
        if not isinstance(getattr(layer, "mlp", None), nn.Module):
            raise ValueError(
                f"{caller}: llm must have {sought}, got {type(layer).__name__} without an mlp, layer {number} "
                f"of {_name(decoder)}"
            )
    return list(layers)


def _width(llm: PreTrainedModel) -> int:
    return llm.config.get_text_config().hidden_size


def _like(layer: nn.Module) -> torch.Tensor:
    """A parameter that the new ones are to be like; a quantised one is of no floating-point dtype."""
    return next(p for p in layer.parameters() if p.is_floating_point())


def _name(module: nn.Module) -> str:
    return type(module).__name__
