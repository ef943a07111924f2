"""Recipes of MoME on what docs/examples/tiny_mome.py writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "tiny_mome.py"
_spec = importlib.util.spec_from_file_location("tiny_mome", EXAMPLE)
assert _spec is not None and _spec.loader is not None
tiny_mome = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_mome)
TASKS: dict[str, str] = tiny_mome.TASKS


def mome_table(root: Path, output: str = "out", **changes: object) -> dict:
    """A recipe as TOML would hold it, of the models and tasks below ``root``."""
    given = {"steps": 4, "batch": 4, "lr": 1e-2, "warmup": 1}
    made = {
        "output": str(root / output),
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 3,
        "data": {"train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")},
        "model": {
            "language": str(root / "llm"),
            "mome": {
                "sentence": str(root / "minilm"),
                "experts": 3,
                "hidden": 4,
                "size": 4,
                "encoders": {name: str(root / name) for name in ("clip", "dino", "pix")},
                "options": {"layers": 1, "heads": 2, "points": 2, "ffn": 16},
            },
        },
        "stage": [{"name": "move", **given}, {"name": "clone"}, {"name": "mole", **given}],
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            value = {**made[key], **value}
        made[key] = value
    return made
