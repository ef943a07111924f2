"""MoME: mixtures of vision experts and of language experts around a transformers decoder."""

from .decoders import (
    add_language_experts,
    instruction_of,
    reclone_language_experts,
    remove_language_experts,
)

__all__ = [
    "add_language_experts",
    "instruction_of",
    "reclone_language_experts",
    "remove_language_experts",
]
