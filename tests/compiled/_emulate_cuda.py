"""Run the CUDA backend's host functions unchanged, with csrc/ compiled to PTX and emulated on the CPU.

::

    with emulated(arch=80, seed=1) as launches:
        y, pre = grouped_linear.grouped_linear(x, ...)  # CPU tensors
    for kernel, stats in launches: ...

Neither a GPU nor the installed extension is needed: what the host functions ask of a kernel stands in its PTX.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ptxsim
from ptxsim import nvcc_helpers
from torch import Tensor

from mixpert_kernels.backends.chips import nvidia
from mixpert_kernels.backends.cuda import _configs, _launch

from ._written import CHECKS, Written

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "ptx"
PTX_ARCHS = {80: "80", 90: "90a"}
INCLUDE = re.compile(r'^#include "(\w+\.c?u?h)"', re.MULTILINE)
DECLARED = re.compile(r"^MIXPERT_KERNEL\((\w+),", re.MULTILINE)


class Launched(NamedTuple):
    """One launch."""

    kernel: str
    stats: ptxsim.Stats


@contextlib.contextmanager
def emulated(
    arch: int = 80, *, multiprocessors: int = 4, choose: Any = None, **launch_options: Any
) -> Iterator[list[Launched]]:
    """Replace ``_launch.launch`` by running the PTX of ``sm_<arch>`` in the emulator.

    Out-of-bounds accesses, races in shared memory, reads of uninitialised memory and deadlocks raise.

    Args:
        arch: 80 or 90; on 90 the kernels of 90a are there too.
        multiprocessors: of the chip, for persistent grids.
        choose: passed on to ``_configs.forced``: which of the kernels that serve a call; None: as on the chip.
        launch_options: of the emulator: ``seed``, ``resident_ctas``, ``interleave``, ``quantum``, ``split``, ...; they
            and the checks are listed in tests/ptxsim/README.md.

    Yields:
        The launches so far, in order: kernel name and counters.
    """
    launches: list[Launched] = []
    written = Written()
    options = CHECKS | launch_options

    def launch(kernel: str, grid: int, args: dict[str, Any]) -> None:
        if grid == 0:
            return
        facts = kernels(arch)[kernel]
        assert set(args) == {f.name for f in facts.fields}, set(args) ^ {
            f.name for f in facts.fields
        }
        numbers = {n: 0 if v is None or _is_place(v) else v for n, v in args.items()}
        plain = [f for f in facts.fields if f.code not in "PT"]
        packed = _launch.pack(
            kernel,
            facts._replace(fields=tuple(plain)),
            {f.name: numbers[f.name] for f in plain},
            None,
            None,
        )
        parts: list[tuple[int, Any]] = [(0, packed)]
        for code, name, offset in facts.fields:
            if code in "PT" and args[name] is not None:
                parts.append((offset, _wrap(args[name], written)))
        constants = facts.constants
        stats = module(arch, kernel).launch(
            kernel,
            grid,
            constants["threads"],
            [ptxsim.Struct(facts.size, parts)],
            dynamic_smem=constants["shared_bytes"],
            **options,
        )
        launches.append(Launched(kernel, stats))

    before = _launch.launch, _launch.kernels, _configs.chip, _launch.resident_blocks
    _launch.launch = launch
    _launch.kernels = lambda: kernels(arch)
    _launch.resident_blocks = lambda kernel, device: 1
    _configs.chip = lambda device: nvidia(arch, multiprocessors)
    try:
        with written, _configs.forced(choose):
            yield launches
    finally:
        _launch.launch, _launch.kernels, _configs.chip, _launch.resident_blocks = before


def _is_place(value: Any) -> bool:
    return isinstance(value, Tensor | _launch.TensorMap)


def _wrap(value: Any, written: Written) -> Any:
    """An argument as the emulator takes it: a tensor together with the map of its initialised bytes."""
    if isinstance(value, _launch.TensorMap):
        known = written.of(value.tensor)
        return ptxsim.TensorMap(value.tensor, value.box, value.swizzle, written=known)
    known = written.of(value)
    return value if known is None else ptxsim.Uninit(value, known)


def sources(arch: int) -> list[Path]:
    """The files with kernels for a chip; ``<name>_sm90a.cu`` holds those that need it."""
    found = sorted(SOURCES.glob("*.cu"))
    return [path for path in found if arch == 90 or not path.stem.endswith("_sm90a")]


def included(path: Path) -> list[Path]:
    """The file itself and the files of csrc/cuda that it includes, in turn."""
    found = [path]
    for file in found:  # grows
        named = (SOURCES / name for name in INCLUDE.findall(file.read_text()))
        found += [name for name in named if name not in found]
    return found


@functools.cache
def ptx(path: Path, arch: int) -> str:
    """The PTX of a file, kept on disk until it changes or what it includes."""
    text = b"\0".join(p.read_bytes() for p in included(path))
    key = hashlib.sha256(text).hexdigest()[:16]
    kept = CACHE / f"{path.stem}-{PTX_ARCHS[arch]}-{key}.ptx"
    if not kept.exists():
        made = nvcc_helpers.compile(path, PTX_ARCHS[arch], includes=[str(SOURCES)])
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            file.write(made)
        os.replace(file.name, kept)  # another process may be making the same
    return kept.read_text()


@functools.cache
def modules(arch: int) -> dict[str, Path]:
    """Which file holds a kernel: what the sources say, so that none is compiled before its kernel is wanted."""
    return {name: path for path in sources(arch) for name in DECLARED.findall(path.read_text())}


@functools.cache
def _load(path: Path, arch: int) -> ptxsim.Module:
    return ptxsim.load(ptx(path, arch))


def module(arch: int, kernel: str) -> ptxsim.Module:
    return _load(modules(arch)[kernel], arch)


class Kernels(Mapping[str, _launch.Facts]):
    """What ``_launch.kernels`` says with the extension: every kernel's facts, read from the PTX when asked for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def __getitem__(self, name: str) -> _launch.Facts:
        return _facts(self.arch, name)

    def __iter__(self) -> Iterator[str]:
        return iter(modules(self.arch))

    def __len__(self) -> int:
        return len(modules(self.arch))

    def __contains__(self, name: object) -> bool:
        return name in modules(self.arch)


@functools.cache
def _facts(arch: int, name: str) -> _launch.Facts:
    variable = rf"(?:_ZN7mixpert\d+)?{name}_factsE?"  # in the namespace or outside
    row = re.search(rf" {variable}\[\d+\] = {{([\d, ]+)}}", ptx(modules(arch)[name], arch))
    values = bytes(int(v) for v in row.group(1).split(","))
    return _launch.parse(values.rstrip(b"\0").rpartition(b";")[0].decode() + ";")


def kernels(arch: int) -> Kernels:
    return Kernels(arch)
