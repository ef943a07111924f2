"""What this installation was built with, and what CUDA finds here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

BUILD_FILE = Path(__file__).with_name("_build.json")


@dataclass(frozen=True)
class BuildInfo:
    """The record the build left behind.

    Attributes:
        extension: True where ``mixpert_kernels._C`` was compiled.
        archs: The GPU architectures it holds code for, such as ``("80", "80+PTX")``.
        left_out: Those that ``MIXPERT_CUDA_ARCHS=all`` would add.
        nvcc: The compiler's version, such as ``"13.0.88"``.
        compiler: The first line of the C++ compiler's ``--version``.
        reason: Why there is no extension; None where there is one.
        log_tail: The last lines of the build log of a failed compilation; otherwise empty.
    """

    extension: bool
    archs: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    nvcc: str | None = None
    compiler: str | None = None
    reason: str | None = None
    log_tail: str = ""


@dataclass(frozen=True)
class CudaFacts:
    """What the compiled extension sees on this machine.

    Attributes:
        runtime: Version of the CUDA runtime in the extension, such as ``"13.0"``.
        driver: Newest CUDA version the driver supports; None where there is no driver.
        devices: One dict a GPU: ``name``, ``capability``, ``memory`` (bytes), ``processors``, and
            ``code``: the architecture of the code that runs there, or CUDA's text why none does.
        error: CUDA's text, or why the extension cannot be asked; None if all went well.
    """

    runtime: str | None = None
    driver: str | None = None
    devices: tuple[dict[str, Any], ...] = ()
    error: str | None = None


def build_info(path: Path = BUILD_FILE) -> BuildInfo:
    """Read the build's record. Never fails: what cannot be read becomes the ``reason``."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        extension = bool(record["extension"])
        return BuildInfo(
            extension=extension,
            archs=tuple(record.get("archs") or ()),
            left_out=tuple(record.get("left_out") or ()),
            nvcc=record.get("nvcc"),
            compiler=record.get("compiler"),
            reason=None if extension else record.get("reason") or "the build gave no reason",
            log_tail=record.get("log_tail") or "",
        )
    except FileNotFoundError:
        return BuildInfo(False, reason="it was never built here: run `pip install -e .`")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return BuildInfo(False, reason=f"{path.name} cannot be read ({error!r})")


def cuda_facts() -> CudaFacts:
    """Ask the compiled extension about CUDA here. Never fails, with or without a driver."""
    info = build_info()
    if not info.extension:
        return CudaFacts(error=f"no compiled extension: {info.reason}")
    try:
        from mixpert_kernels import _C  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        return CudaFacts(error=f"the compiled extension does not load: {error}")
    runtime = driver = None
    try:
        runtime = _version(_C.runtime_version())
        driver = _version(_C.driver_version())
        devices = tuple(_device(_C, index) for index in range(_C.device_count()))
        return CudaFacts(runtime, driver, devices)
    except RuntimeError as error:
        return CudaFacts(runtime, driver, error=str(error))


def _device(extension: Any, index: int) -> dict[str, Any]:
    facts = dict(extension.device(index))
    try:
        facts["code"] = f"sm_{extension.code_version(index)}"
    except RuntimeError as error:
        facts["code"] = str(error)
    return facts


def _version(number: int) -> str | None:
    """Turn CUDA's 13000 into "13.0", and 0 (no driver) into None."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
