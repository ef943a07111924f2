"""Which backend ``auto`` tries first: the one measured best on this device, else the shipped table's, else none.

A measurement is of a shape class: op, dtype and the widths of the layer. The numbers of tiles and tokens are no part of
it, and ``first`` is not told them: a tile's result must not depend on the batch it is in.

``mixpert tune`` measures and stores. A file is of one device and one set of versions, and lies in
``MIXPERT_CACHE_DIR``, else in ``mixpert_kernels`` below ``XDG_CACHE_HOME`` or ``~/.cache``. It is read once a process
and device, at the first call. ``MIXPERT_BACKEND_TABLE=0`` ignores stored measurements.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixpert_kernels._build_info import __version__, build_info

from .chips import chip
from .shipped import shipped

FORMAT = 1
Key = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Measured:
    """The outcome for one shape class.

    Attributes:
        op: its name.
        dtype: of the features, such as ``bfloat16``.
        widths: of the layer, as the op passes them to ``backends.pick``.
        backend: the fastest.
        date: such as ``2026-01-31``.
        ratios: time of ``backend`` over that of each other candidate, the geometric mean over the batches.
        batches: numbers of tiles it was measured at.
        training: whether backward was measured too.
        captured: whether CUDA graphs were timed, without the host's part.
    """

    op: str
    dtype: str
    widths: tuple[int, ...]
    backend: str
    date: str
    ratios: dict[str, float] = field(default_factory=dict)
    batches: tuple[int, ...] = ()
    training: bool = False
    captured: bool = False

    @property
    def key(self) -> Key:
        return self.op, getattr(torch, self.dtype), self.widths

    @property
    def reason(self) -> str:
        others = [f"{ratio:.2f} of {name}" for name, ratio in self.ratios.items()]
        how = " in CUDA graphs" if self.captured else ""
        return f"measured here on {self.date}{how}: {', '.join(others) or 'no other could run'}"


@dataclass
class Table:
    """What is known of one device: ``measured`` by shape class; ``fault`` says why a file was not read."""

    chip: str | None = None
    path: Path | None = None
    measured: dict[Key, Measured] = field(default_factory=dict)
    fault: str | None = None
    _shipped: dict[tuple[str, torch.dtype], str | None] = field(default_factory=dict)

    def shipped(self, op: str, dtype: torch.dtype) -> str | None:
        """The backend of the shipped row."""
        if (op, dtype) not in self._shipped:
            row = None if self.chip is None else shipped(self.chip, op, _name(dtype))
            self._shipped[op, dtype] = None if row is None else row.backend
        return self._shipped[op, dtype]


_tables: dict[torch.device, Table] = {}
_lock = threading.Lock()


def first(
    op: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()
) -> str | None:
    """Return the backend to try first, None where nothing is known.

    Whether it can run the call is for the caller to ask.
    """
    known = _tables.get(device) or table(device)
    if known.measured and (row := known.measured.get((op, dtype, widths))):
        return row.backend
    return known.shipped(op, dtype)


def reason(
    op: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()
) -> str | None:
    """Return what ``first`` rests on; None where nothing is known."""
    known = table(device)
    if row := known.measured.get((op, dtype, widths)):
        return row.reason
    row = None if known.chip is None else shipped(known.chip, op, _name(dtype))
    return None if row is None else f"shipped row: {row.rests_on}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(device: torch.device) -> Table:
    """What is known of a device, read at its first use."""
    with _lock:
        if device not in _tables:
            _tables[device] = _read(device)
        return _tables[device]


def forget() -> None:
    """Read the files again at the next call."""
    with _lock:
        _tables.clear()


def cache_dir() -> Path:
    """Where measurements are stored."""
    if own := os.environ.get("MIXPERT_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mixpert_kernels"


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement is valid for: the device, and the versions of all that runs on it.

    Raises:
        RuntimeError: there is no such device here.
    """
    build = build_info()
    facts = {
        "device": device_name(device),
        "mixpert-kernels": __version__,
        "extension": ", ".join(build.archs) + f" by nvcc {build.nvcc}" if build.extension else "no",
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts["driver"] = _driver()
    return facts


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU with its widest vector instructions.

    Raises:
        RuntimeError: there is no such device here.
    """
    if device.type == "cpu":
        return f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RuntimeError(f"no device {device} here: {' '.join(str(error).split())}") from None


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def file_of(facts: dict[str, str]) -> Path:
    """The file of one device and set of versions."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")[:48]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / f"{slug}-{digest}.json"


def store(device: torch.device, rows: Iterable[Measured]) -> Path:
    """Add measurements to the file of a device, in place of older ones of the same classes.

    The file is replaced in one step: whoever reads at that time sees the old or the new one, whole.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written; the message names the directory.
    """
    facts = identity(device)
    path = file_of(facts)
    kept: dict[Key, Measured] = {}
    with contextlib.suppress(FileNotFoundError, OSError, ValueError):
        kept = _parse(path.read_text(encoding="utf-8"), facts)
    kept |= {row.key: row for row in rows}
    text = json.dumps(
        {"format": FORMAT, "identity": facts, "rows": [asdict(row) for row in kept.values()]},
        indent=1,
    )
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".", suffix=".json", delete=False, encoding="utf-8"
        ) as file:
            draft = Path(file.name)
            file.write(text + "\n")
        os.replace(draft, path)
    except OSError as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise OSError(
            f"the measurements cannot be written to {path.parent} ({error.strerror}); "
            "MIXPERT_CACHE_DIR names another directory"
        ) from error
    forget()
    return path


def _read(device: torch.device) -> Table:
    """The table of a device. Never fails: a GPU that is not there has an empty one."""
    try:
        known = Table("cpu" if device.type == "cpu" else chip(device).name)
        facts = identity(device)
    except (AssertionError, RuntimeError, ValueError):
        return Table()
    if os.environ.get("MIXPERT_BACKEND_TABLE") == "0":
        return known
    try:
        known.path = file_of(facts)
        known.measured = _parse(known.path.read_text(encoding="utf-8"), facts)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home directory
        known.fault = (
            f"{known.path or 'the cache directory'} is ignored: {error}; run `mixpert tune`"
        )
        warnings.warn(f"mixpert_kernels: {known.fault}", stacklevel=2)
    return known


def _parse(text: str, facts: dict[str, str]) -> dict[Key, Measured]:
    """The measurements in a file's text; ValueError says what is wrong with it."""
    try:
        record: Any = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, not {FORMAT}")
        if record["identity"] != facts:
            raise ValueError("it is of another device or other versions")
        found = {}
        for given in record["rows"]:
            sizes = {name: tuple(map(int, given[name])) for name in ("widths", "batches")}
            row = Measured(**(given | sizes))
            if not all(isinstance(v, str) for v in (row.op, row.backend, row.date)):
                raise TypeError("a name is no text")
            row.ratios.update({name: float(ratio) for name, ratio in row.ratios.items()})
            if not isinstance(row.key[1], torch.dtype):
                raise TypeError(f"{row.dtype} is no dtype")
            found[row.key] = row
        return found
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The driver's version where the system tells it, else the CUDA version it serves."""
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        if found := re.search(r"\d+\.\d+(\.\d+)?", first):
            return found.group()
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(ask()) if ask is not None else "unknown"
