"""What ninja is told: the sources, the compilers' flags, one object a source, the link.

A file named ``*_sm90a.cu`` holds kernels for sm_90a alone. It is compiled for 90a only, and left out where
90a is not asked for, so that a kernel which is registered has code. What the assembler says of each kernel
(registers, spills) is kept beside its object, in ``<object>.log``.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "csrc/bindings.cpp",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu")),
]


@dataclass(frozen=True)
class Toolchain:
    """The compilers and what they are to compile for."""

    nvcc: str
    cxx: tuple[str, ...]
    archs: tuple[str, ...]
    launcher: tuple[str, ...] = ()  # such as ("ccache",); before each compiler

    @property
    def host_compiler(self) -> str:
        """The compiler's own path, without a launcher such as ccache and without options."""
        return next(word for word in reversed(self.cxx) if not word.startswith("-"))


def units(archs: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield each source with its object's name and the architectures it is compiled for."""
    for source in SOURCES:
        path = Path(source)
        own = archs
        if path.stem.endswith("_sm90a"):
            own = tuple(arch for arch in archs if arch.removesuffix("+PTX") == "90a")
        if own:
            yield source, f"{path.stem}{path.suffix.replace('.', '_')}.o", own


def ninja_lines(toolchain: Toolchain, includes: list[str], *, strict: bool) -> Iterator[str]:
    """Yield build.ninja: ``objects``, one a source, and ``_C.so``, linked by nvcc too.

    Args:
        toolchain: the compilers.
        includes: where pybind11 and Python have their headers.
        strict: warnings are errors.
    """
    nvcc = [toolchain.nvcc, "-ccbin", toolchain.host_compiler]
    compile_cu = [*toolchain.launcher, *nvcc, "-std=c++17", "-O3", "-Xptxas", "-v"]
    compile_cu += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    compile_cpp = [*toolchain.cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
    if len([word for word in toolchain.cxx if not word.startswith("-")]) == 1:
        compile_cpp = [*toolchain.launcher, *compile_cpp]  # CXX="ccache g++" has its own
    compile_cpp += [f"-isystem{path}" for path in includes]
    if strict:
        compile_cu.append("-Werror=all-warnings")  # one word: ccache takes a second for a file
        compile_cpp.append("-Werror")
    # The static runtime's symbols stay inside: torch brings a CUDA runtime of its own.
    link = [*nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    logged = [sys.executable, str(ROOT / "csrc" / "run_compiler.py")]
    run_cu = f"{_shell(logged)} $out.log $out {'strict' if strict else 'lenient'}"
    run_cu += f" {_shell(compile_cu)} $archs -MD -MF $out.d -c $in -o $out"
    yield from ("rule cu", f"  command = {run_cu}", "  deps = gcc", "  depfile = $out.d")
    yield from ("rule cpp", f"  command = {_shell(compile_cpp)} -MD -MF $out.d -c $in -o $out")
    yield from ("  deps = gcc", "  depfile = $out.d")
    yield from ("rule link", f"  command = {_shell(link)} $archs $in -o $out")
    objects = []
    for source, name, archs in units(toolchain.archs):
        objects.append(name)
        yield f"build {name}: {Path(source).suffix[1:]} {_escape(ROOT / source)}"
        yield f"  archs = {_shell(arch_flags(archs))}"
    yield f"build objects: phony {' '.join(objects)}"
    yield f"build _C.so: link {' '.join(objects)}"
    yield f"  archs = {_shell(arch_flags(toolchain.archs))}"


def arch_flags(archs: tuple[str, ...]) -> Iterator[str]:
    """Yield nvcc's flags: code for each architecture, and PTX where it says ``+PTX``."""
    for arch in archs:
        chip = arch.removesuffix("+PTX")
        yield f"-gencode=arch=compute_{chip},code=sm_{chip}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{chip},code=compute_{chip}"


def _shell(words: Iterator[str] | list[str]) -> str:
    """Quote for the shell, then for ninja."""
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    """Escape a path for a ninja build line; ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))
