"""The one checkpoint of a run, and other files: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAME = "checkpoint.pt"
FORMAT = 1


def save_checkpoint(output: Path, state: dict[str, Any]) -> None:
    """Put ``state`` in the place of the run's last checkpoint, once it is on the disk; see ``save_whole``."""
    save_whole(output / NAME, {"format": FORMAT, **state})


def load_checkpoint(output: Path) -> dict[str, Any] | None:
    """Return the last checkpoint of a run, tensors on the CPU; None where there is none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = output / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"train: {path} must be a whole checkpoint, got: {reason}") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"train: {path} must be of format {FORMAT}, got {state.get('format')}")
    return state


def save_whole(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, for ``torch.load(weights_only=True)``, whole or not at all.

    Raises:
        RuntimeError: it cannot be written, because the disk is full, say; the file that was there stays as it was, and
            nothing else is left.
    """
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns some of the first into the second
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        kept = "the last one is as it was" if path.exists() else "there is none"
        reason = " ".join(str(error.__context__ or error).split())
        raise RuntimeError(f"train: could not save {path}, {kept}: {reason}") from error


def check_finite(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raise RuntimeError if one of the model's weights in ``state`` is not finite: nothing could go on from it."""
    for name, _ in model.named_parameters():
        if name in state and not bool(state[name].isfinite().all()):
            raise RuntimeError(
                f"train: weights must be finite to be saved, got {name} after {where}; the last checkpoint is as it was"
            )


def clean(output: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for draft in output.glob(".*"):
        if draft.name.endswith(".draft"):
            draft.unlink()
        elif (
            draft.name.lstrip(".").startswith(("tower.", "head.", "model."))
            and draft.suffix != ".old"
        ):
            shutil.rmtree(draft, ignore_errors=True)  # .old: what it was to replace, put back later


def draft_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.draft")


def write_text_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    draft = draft_of(path)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # has no such thing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
