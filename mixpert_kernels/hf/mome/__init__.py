"""MoME: mixtures of vision experts and of language experts around a transformers decoder."""

from .build import build
from .decoders import (
    add_language_experts,
    instruction_of,
    reclone_language_experts,
    remove_language_experts,
)
from .encoders import Encoder, load_encoder
from .model import MomeForConditionalGeneration, Prompt
from .original import load_original
from .processor import Processor
from .routes import Routes, route
from .saving import is_saved, load, save
from .sentence import SentenceEncoder

__all__ = [
    "Encoder",
    "MomeForConditionalGeneration",
    "Processor",
    "Prompt",
    "Routes",
    "SentenceEncoder",
    "add_language_experts",
    "build",
    "instruction_of",
    "is_saved",
    "load",
    "load_encoder",
    "load_original",
    "reclone_language_experts",
    "remove_language_experts",
    "route",
    "save",
]
