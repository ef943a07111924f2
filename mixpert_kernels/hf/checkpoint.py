"""Checkpoint directories: read with every fault named, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def locate(directory: str | os.PathLike, model_type: str, formats: tuple[int, ...]) -> Path:
    """Return the directory of a checkpoint of ``model_type``.

    Raises:
        ValueError: the directory is missing, is no checkpoint, or is one of another model or format.
    """
    path = Path(directory)
    if not path.exists() and _backup(path).exists():
        path = _backup(path)  # a save was interrupted between its two renames
    if not path.is_dir():
        raise ValueError(f"from_pretrained: directory must exist, got {directory}")
    config = _read_object(path, CONFIG)
    if config.get("model_type") != model_type:
        raise ValueError(
            f"from_pretrained: model_type in {path / CONFIG} must be {model_type}, got {config.get('model_type')}"
        )
    if config.get("mixpert_format", 1) not in formats:
        raise ValueError(
            f"from_pretrained: mixpert_format in {path / CONFIG} must be one of {formats}, "
            f"got {config['mixpert_format']}: another version of mixpert_kernels wrote it"
        )
    return path


def keys(path: Path) -> list[str]:
    """Return the names of all tensors in the checkpoint, having opened every file of it.

    Raises:
        ValueError: a weight file is missing or truncated.
    """
    files = [WEIGHTS]
    if (path / INDEX).exists():
        places = _read_object(path, INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"from_pretrained: {path / INDEX} must hold weight_map, got {places}")
        files = sorted(set(places.values()))
    found: list[str] = []
    for name in files:
        if not (path / name).is_file():
            raise ValueError(f"from_pretrained: directory must hold {name}, got {path}")
        try:
            with safe_open(path / name, framework="pt") as file:
                found += file.keys()
        except SafetensorError as error:
            raise ValueError(
                f"from_pretrained: {path / name} must be a whole safetensors file, got {error}"
            ) from None
    return found


def _read_object(path: Path, name: str) -> dict:
    try:
        found = json.loads((path / name).read_text())
    except FileNotFoundError:
        raise ValueError(f"from_pretrained: directory must hold {name}, got {path}") from None
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path / name} must be JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"from_pretrained: {path / name} must hold a JSON object, got {found}")
    return found


def write_whole(
    directory: str | os.PathLike, write: Callable[[Path], None], ours: tuple[str, ...] = ()
) -> None:
    """Have ``write`` fill a new directory, then put it in the place of ``directory``.

    Until the files are complete the old checkpoint is not touched. Files in the directory that are no part of a
    checkpoint (an image processor's, say) are kept; ``ours`` names directories that are.
    """
    path = Path(directory).resolve()  # a link stays one, and "." has a name
    if path.is_file():
        raise ValueError(f"save_pretrained: directory must not be a file, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write(draft)
        if path.exists():
            _keep_others(path, draft, ours)
        os.chmod(draft, 0o777 & ~_umask())
        backup = _backup(path)
        if path.exists():
            shutil.rmtree(backup, ignore_errors=True)
            os.replace(path, backup)
        os.replace(draft, path)
        shutil.rmtree(backup, ignore_errors=True)
    finally:
        _recover(path)
        shutil.rmtree(draft, ignore_errors=True)


def _keep_others(old: Path, new: Path, directories: tuple[str, ...]) -> None:
    for entry in old.iterdir():
        weights = entry.name.startswith("model") and entry.suffix == ".safetensors"
        ours = entry.name in (CONFIG, INDEX, *directories) or weights
        if ours or (new / entry.name).exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name)
        else:
            shutil.copy2(entry, new / entry.name)


def _recover(path: Path) -> None:
    """Undo the first of the two renames where the second did not follow."""
    if not path.exists() and _backup(path).exists():
        os.rename(_backup(path), path)


def _backup(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
