"""build: vision experts and language experts around an LLM and encoders that stay frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixpert_kernels.hf.loading import LOCAL, directory_of, one_line, quiet
from mixpert_kernels.modules.mole import SENTENCE_WIDTH
from mixpert_kernels.modules.move import MixtureOfVisionExperts, VisionBranch

from .decoders import add_language_experts
from .encoders import Encoder, load_encoder
from .model import MomeForConditionalGeneration
from .processor import ImageProcessor, Processor, load_image_processor
from .sentence import Embed, SentenceEncoder

OPTIONS = ("transform", "norm", "cls", "layers", "heads", "points", "ffn", "dropout")


def build(
    llm: PreTrainedModel | Path | str,
    encoders: Mapping[str, nn.Module | Path | str],
    *,
    sentence_encoder: Embed | Path | str | None = None,
    experts: int = 4,
    hidden: int = 64,
    mix: str = "router",
    options: Mapping[str, Any] | None = None,
    branches: Mapping[str, Mapping[str, Any]] | None = None,
    size: int = 16,
    sentence_width: int | None = None,
    image_token_id: int | None = None,
    processors: Mapping[str, ImageProcessor] | None = None,
    dtype: torch.dtype | None = None,
) -> MomeForConditionalGeneration:
    """Build a MoME model; all but its own parts is frozen.

    Args:
        llm: a causal LM of transformers, changed in place, or its directory. Llama, Qwen2, Mistral, Gemma, or another
            whose layers have an ``mlp``.
        encoders: by a name of yours, in the order of the router's weights: transformers models or their directories
            (CLIP, EVA of BLIP-2 or InstructBLIP, SigLIP, DINOv2, ViT, Pix2Struct), or any module that returns
            ``Features`` and has a ``width``.
        sentence_encoder: a directory of BERT or MiniLM, or any function from B texts to embeddings (B, S); None:
            instructions are given as embeddings.
        experts: K, adapters beside each FFN of the LLM; 1 for stage 1, 0 for none.
        hidden: width of an adapter.
        mix: ``router``, or ``addition`` (an ablation).
        options: of all branches: ``transform`` (``deformable``, ``standard``, ``pool``, ``none``), ``norm``, ``cls``,
            and the transform's ``layers``, ``heads``, ``points``, ``ffn``, ``dropout``. By default a branch whose
            patches are on a grid of that size has no transform and the others a deformable one; there is a LayerNorm
            before the projection where there is no transform or the encoder ends in no LayerNorm of its own; and the
            first CLIP or EVA gives its CLS, or no branch.
        branches: the same for single branches, by name.
        size: side of the grid of visual tokens: there are size * size, and the CLS.
        sentence_width: S, where it is not the sentence encoder's ``width`` or 384.
        image_token_id: of the placeholder for the visual tokens; None: they come before the text.
        processors: by branch, its image processor, where its directory has none or another is wanted.
        dtype: of the new parameters; None: the LLM's. To train beside a half-precision LLM take float32.

    Returns:
        The model, in evaluation mode, on the LLM's device, where the encoders are moved too.

    Raises:
        ValueError: an argument is out of its range, an option or name is unknown, or a directory holds no such model.
    """
    if experts < 0:
        raise ValueError(f"build: experts must be at least 0, got {experts}")
    _check_names(encoders, options, branches, processors)
    sources: dict[str, Path] = {}
    llm = _llm(llm, sources)
    like = llm.get_input_embeddings().weight
    sentence_encoder = _sentence_encoder(sentence_encoder, sources)
    if sentence_width is None:
        sentence_width = getattr(sentence_encoder, "width", SENTENCE_WIDTH)
    found, readers = _encoders(encoders, sources)
    chosen = {name: dict(options or {}) | dict((branches or {}).get(name, {})) for name in found}
    chosen = _defaults(found, chosen, size)
    width = llm.config.get_text_config().hidden_size
    made = {
        name: VisionBranch(encoder, _width(name, encoder), width, size=size, **chosen[name])
        for name, encoder in found.items()
    }
    move = MixtureOfVisionExperts(made, width, sentence_width, mix)
    for name, parameter in move.named_parameters():
        if ".encoder." not in name:
            parameter.data = parameter.data.to(dtype or like.dtype)
    llm.requires_grad_(False)
    instruction = None
    if experts:
        instruction = add_language_experts(
            llm, experts=experts, hidden=hidden, sentence_width=sentence_width, dtype=dtype
        )
    if isinstance(sentence_encoder, nn.Module):
        sentence_encoder.requires_grad_(False).to(like.device)
    readers |= processors or {}
    return MomeForConditionalGeneration(
        llm,
        move.to(like.device),
        instruction=instruction,
        sentence_encoder=sentence_encoder,
        image_token_id=image_token_id,
        processor=Processor({name: readers[name] for name in found if name in readers}),
        options=chosen,
        sources=sources,
    ).eval()


def load_llm(directory: Path | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a causal LM that lacks no parameter.

    Raises:
        ValueError: the directory is missing, holds no causal LM, or one that lacks a parameter.
    """
    directory = directory_of("load_llm", directory)
    with quiet(), one_line("load_llm", directory, "a transformers causal LM"):
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, **LOCAL
        )
        if report["missing_keys"]:
            raise ValueError(f"no {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def _llm(given: Any, sources: dict[str, Path]) -> PreTrainedModel:
    if isinstance(given, str | Path):
        sources["llm"] = Path(given)
        return load_llm(given)
    if not isinstance(given, PreTrainedModel) or not given.can_generate():
        raise ValueError(f"build: llm must be a causal LM of transformers, got {_of(given)}")
    return given


def _sentence_encoder(given: Any, sources: dict[str, Path]) -> Any:
    if isinstance(given, str | Path):
        sources["sentence_encoder"] = Path(given)
        return SentenceEncoder(given)
    if given is not None and not callable(given):
        raise ValueError(
            f"build: sentence_encoder must be a directory, a function or None, got {_of(given)}"
        )
    return given


def _encoders(
    given: Mapping[str, Any], sources: dict[str, Path]
) -> tuple[dict[str, nn.Module], dict[str, ImageProcessor]]:
    found: dict[str, nn.Module] = {}
    readers = {}
    for name, encoder in given.items():
        if isinstance(encoder, str | Path):
            sources[name] = Path(encoder)
            reader = load_image_processor(sources[name])
            if reader is not None:
                readers[name] = reader
            found[name] = load_encoder(encoder)
        elif isinstance(encoder, PreTrainedModel):
            found[name] = Encoder(encoder)
        elif isinstance(encoder, nn.Module):
            found[name] = encoder
        else:
            raise ValueError(
                f"build: encoders[{name!r}] must be a module or a directory, got {_of(encoder)}"
            )
    return found, readers


def _defaults(
    encoders: Mapping[str, nn.Module], chosen: dict[str, dict[str, Any]], size: int
) -> dict[str, dict[str, Any]]:
    """The options of each branch, with what was not chosen."""
    if not any("cls" in options for options in chosen.values()):
        seers = [n for n, e in encoders.items() if isinstance(e, Encoder) and _is_clip(e)]
        for name in seers[:1]:
            chosen[name]["cls"] = True
    for name, encoder in encoders.items():
        options = chosen[name]
        fits = getattr(encoder, "grid", None) == (size, size)
        options.setdefault("transform", "none" if fits else "deformable")
        normed = not isinstance(encoder, Encoder) or encoder.kind.normed
        options.setdefault("norm", options["transform"] == "none" or not normed)
    return chosen


def _is_clip(encoder: Encoder) -> bool:
    return encoder.has_cls and not encoder.kind.normed


def _width(name: str, encoder: nn.Module) -> int:
    width = getattr(encoder, "width", None)
    if not isinstance(width, int):
        raise ValueError(
            f"build: encoders[{name!r}] must have a width, that of its features, got {_of(encoder)} without"
        )
    return width


def _check_names(encoders: Any, options: Any, branches: Any, processors: Any) -> None:
    if not isinstance(encoders, Mapping) or not encoders:
        raise ValueError(f"build: encoders must be a mapping of at least one, got {encoders}")
    taken = {"llm", "sentence_encoder"} & encoders.keys()
    if taken or any("." in name or not name for name in encoders):
        raise ValueError(
            f"build: encoders must have names without dots, other than llm and sentence_encoder, got {list(encoders)}"
        )
    for what, given in (("branches", branches), ("processors", processors)):
        unknown = sorted((given or {}).keys() - encoders.keys())
        if unknown:
            raise ValueError(
                f"build: {what} must be of the encoders {', '.join(encoders)}, got {', '.join(unknown)}"
            )
    for given in (options or {}, *(branches or {}).values()):
        unknown = [name for name in given if name not in OPTIONS]
        if unknown:
            raise ValueError(
                f"build: options of a branch must be of {', '.join(OPTIONS)}, got {', '.join(unknown)}"
            )


def _of(given: Any) -> str:
    return type(given).__name__
