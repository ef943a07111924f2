"""Parameter names that changed between versions of transformers: the one table of renames.

A checkpoint keeps the names of the version that wrote it, which its configuration records. Loading tries each row whose
left side is in the checkpoint and whose right side is in the model, so that either version reads the other's.
"""

from __future__ import annotations

import re

# (pattern, replacement): both ways round for each pair of spellings.
_DINO = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
}


def renamed(key: str, wanted: set[str], model_type: str) -> str:
    """Return the name ``key`` has among ``wanted``; ``key`` itself if no spelling of it is there."""
    if key in wanted:
        return key
    for one, other in RENAMES.get(model_type, ()):
        for old, new in ((one, other), (other, one)):
            candidate = re.sub(rf"\b{re.escape(old)}\b", new, key)
            if candidate in wanted:
                return candidate
    return key


def renames(found: list[str], wanted: set[str], model_type: str) -> dict[str, str]:
    """Return transformers' ``key_mapping``, from the names in a checkpoint to ``wanted``, where they differ."""
    pairs = {key: renamed(key, wanted, model_type) for key in found}
    return {f"^{re.escape(old)}$": new for old, new in pairs.items() if old != new}
