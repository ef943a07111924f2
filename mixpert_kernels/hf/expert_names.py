"""What experts are called, for people."""

from __future__ import annotations

from typing import Any


def are_names(names: Any, num_experts: int) -> bool:
    """Whether ``names`` is None, or E different strings of which none is blank."""
    if names is None:
        return True
    strings = all(isinstance(name, str) and name.strip() for name in names)
    return strings and len(set(names)) == len(names) == num_experts


def names_of(settings: Any) -> list[str]:
    """The experts' names; ``expert 0``, ``expert 1``, ... where the model was given none.

    Args:
        settings: a ``MixpertVisionConfig``, or a mixpertized model's ``Settings``.
    """
    return list(settings.expert_names or (f"expert {k}" for k in range(settings.num_experts)))
