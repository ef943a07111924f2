"""Settings as dataclasses: filled from a table of TOML, each fault named by its dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any


def flat(value: Any, where: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{where}[{i}]")
    else:
        yield where, str(value) if isinstance(value, Path) else value


def parse(cls: type, table: dict[str, Any], where: str, base: Path) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"train: {where.rstrip('.')} must be a table, got {table!r}")
    hints = typing.get_type_hints(cls)
    known = {f.metadata.get("key", f.name): f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"train: {where}{key} must be a known key, perhaps {where}{near}, got {key}"
            )
    for key, entry in known.items():
        unset = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if unset and key not in table:
            raise ValueError(f"train: {where}{key} must be given, got none")
    values = {
        known[k].name: _value(hints[known[k].name], v, where + k, base) for k, v in table.items()
    }
    return cls(**values)


def _value(hint: Any, value: Any, where: str, base: Path) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, f"{where}.", base)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"train: {where} must be a table, got {value!r}")
        inner = typing.get_args(hint)[1]
        return {key: _value(inner, item, f"{where}.{key}", base) for key, item in value.items()}
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"train: {where} must be a list, got {value!r}")
        return [_value(typing.get_args(hint)[0], item, where, base) for item in value]
    if hint is Path and isinstance(value, str | Path):
        return base / Path(value).expanduser()
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        wanted = {int: "whole number", float: "number", Path: "path", bool: "boolean"}.get(
            hint, "string"
        )
        raise ValueError(f"train: {where} must be a {wanted}, got {value!r}")
    return value


def toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    require(value in choices, name, f"be one of {', '.join(choices)}", value)


def require(holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"train: {name} must {condition}, got {got}")
