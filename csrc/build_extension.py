"""Compile mixpert_kernels._C where nvcc is found, and record what was built or why nothing was.

Used by setup.py alone. It imports the standard library and setuptools; ninja and pybind11 only
once there is something to compile. The extension links the CUDA runtime statically, and no path is
derived from nvcc's place, which may be that of a wrapper script.

Environment:
    MIXPERT_SKIP_CUDA=1: compile nothing.
    MIXPERT_CUDA_ARCHS: "80;90a", "80+PTX" or "all"; otherwise the GPUs that nvidia-smi shows.
    CUDA_HOME, PATH: where nvcc is looked for, in this order.
    CXX: the C++ compiler; otherwise c++, g++ or clang++.
    MAX_JOBS: how many compilers run at a time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent
NAME = "mixpert_kernels._C"
SOURCES = [
    "csrc/bindings.cpp",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu")),
]
# sm_80 code serves 86 and 89, and its PTX every later chip that has no code of its own.
ALL_ARCHS = ("80+PTX", "90a", "100", "120")
DEFAULT_ARCHS = ("80+PTX",)
LOG_LINES = 40


class NoExtension(Exception):
    """A reason to install without the extension. Not an error."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers and what they are to compile for."""

    nvcc: str
    cxx: tuple[str, ...]
    archs: tuple[str, ...]

    @property
    def host_compiler(self) -> str:
        """The compiler's own path, without a launcher such as ccache and without options."""
        return next(word for word in reversed(self.cxx) if not word.startswith("-"))


class BuildExtension(build_ext):
    """Replaces setuptools' compilation by ninja's, and leaves ``_build.json`` behind."""

    def run(self) -> None:
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd"), folder / "_build.json"):
            old.unlink(missing_ok=True)
        record: dict[str, object] = {"extension": False}
        try:
            toolchain = find_toolchain()
            record |= describe(toolchain)
            objects = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
            shutil.copyfile(compile_extension(toolchain, objects), self._library())
            record["extension"] = True
        except NoExtension as reason:
            record["reason"] = str(reason)
            print(f"mixpert_kernels: no compiled extension: {reason}")
        except CompileError as error:
            record |= {"reason": "the compilation failed", "log_tail": str(error)}
            raise
        finally:
            text = json.dumps(record, indent=2) + "\n"
            (folder / "_build.json").write_text(text, encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) if self._in_place() else self._built()

    def get_output_mapping(self) -> dict[str, str]:
        """Say where an in-place build's files would lie in a wheel (strict editable installs)."""
        if not self._in_place():
            return {}
        package = Path(self.build_lib) / "mixpert_kernels"
        return {str(package / Path(path).name): path for path in self._built()}

    def _built(self) -> list[str]:
        paths = (self._library(), self._folder() / "_build.json")
        return [str(path) for path in paths if path.exists()]

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _folder(self) -> Path:
        return (ROOT if self._in_place() else Path(self.build_lib)) / "mixpert_kernels"

    def _library(self) -> Path:
        return self._folder() / Path(self.get_ext_filename(NAME)).name


def find_toolchain() -> Toolchain:
    """Find the compilers and the architectures.

    Raises:
        NoExtension: There is nothing to compile with, or it is not wanted.
        CompileError: ``MIXPERT_CUDA_ARCHS`` cannot be read.
    """
    if os.environ.get("MIXPERT_SKIP_CUDA") == "1":
        raise NoExtension("MIXPERT_SKIP_CUDA=1")
    if not sys.platform.startswith("linux"):
        raise NoExtension(f"it is built on Linux only, not on {sys.platform}")
    nvcc = None
    if os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise NoExtension("nvcc was found neither in CUDA_HOME nor on PATH")
    return Toolchain(nvcc, _find_cxx(), find_archs())


def _find_cxx() -> tuple[str, ...]:
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(words[0])
        if found:
            return (found, *words[1:])
    looked_for = f"CXX={shlex.join(named)}" if named else "c++, g++, clang++"
    raise NoExtension(f"no C++ compiler was found ({looked_for})")


def find_archs() -> tuple[str, ...]:
    """Return the architectures to compile for, such as ``("80+PTX", "90a")``."""
    text = os.environ.get("MIXPERT_CUDA_ARCHS", "").strip()
    if text == "all":
        return ALL_ARCHS
    archs = tuple(dict.fromkeys(arch for arch in re.split(r"[;,\s]+", text) if arch))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            wanted = '"all" or a list such as "80;90a" or "80+PTX"'
            raise CompileError(f"build: MIXPERT_CUDA_ARCHS must be {wanted}, got {text!r}")
    return archs or _archs_of_gpus() or DEFAULT_ARCHS


def _archs_of_gpus() -> tuple[str, ...]:
    """Ask nvidia-smi; GPUs before sm_80 are left out. 90 becomes 90a, which has wgmma."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    lines = _output(query).splitlines()
    caps = {int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)}
    return tuple("90a" if cap == 90 else str(cap) for cap in sorted(caps) if cap >= 80)


def describe(toolchain: Toolchain) -> dict[str, object]:
    """Return what ``_build.json`` says of the compilers."""
    version = re.search(r"V(\d+\.\d+\.\d+)", _output([toolchain.nvcc, "--version"]))
    compiler = _output([*toolchain.cxx, "--version"]).splitlines()
    return {
        "archs": toolchain.archs,
        "nvcc": version.group(1) if version else None,
        "compiler": compiler[0] if compiler else None,
    }


def compile_extension(toolchain: Toolchain, folder: Path) -> Path:
    """Run ninja in ``folder``; files that did not change are not compiled again.

    Returns:
        The library's path.

    Raises:
        CompileError: A compiler failed; the message ends with the tail of its log.
    """
    try:
        import ninja
        import pybind11
    except ImportError as error:
        wanted = "--no-build-isolation needs `pip install setuptools ninja pybind11`"
        raise CompileError(f"build: {error}; {wanted}, or set MIXPERT_SKIP_CUDA=1") from None
    folder.mkdir(parents=True, exist_ok=True)
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    rules = "\n".join(ninja_lines(toolchain, folder, includes)) + "\n"
    (folder / "build.ninja").write_text(rules, encoding="utf-8")
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-v"]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-LOG_LINES:])
        hint = "set MIXPERT_SKIP_CUDA=1 to install without it"
        raise CompileError(f"build: {toolchain.nvcc} failed ({hint}). The log ends:\n{tail}")
    return folder / "_C.so"


def ninja_lines(toolchain: Toolchain, folder: Path, includes: list[str]) -> Iterator[str]:
    """Yield build.ninja: one object a source, then the link, done by nvcc too."""
    nvcc = [toolchain.nvcc, "-ccbin", toolchain.host_compiler, *arch_flags(toolchain.archs)]
    compile_cu = [*nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    compile_cpp = [*toolchain.cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
    compile_cpp += [f"-isystem{path}" for path in includes]
    # The static runtime's symbols stay inside: torch brings a CUDA runtime of its own.
    link = [*nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    for rule, command, rest in (
        ("cu", compile_cu, "-MD -MF $out.d -c $in -o $out"),
        ("cpp", compile_cpp, "-MD -MF $out.d -c $in -o $out"),
        ("link", link, "$in -o $out"),
    ):
        yield f"rule {rule}"
        yield f"  command = {shlex.join(command).replace('$', '$$')} {rest}"
        if rule != "link":
            yield from ("  deps = gcc", "  depfile = $out.d")
    objects = []
    for source in SOURCES:
        path = ROOT / source
        objects.append(f"{path.stem}{path.suffix.replace('.', '_')}.o")
        yield f"build {objects[-1]}: {path.suffix[1:]} {_escape(path)}"
    yield f"build _C.so: link {' '.join(objects)}"


def arch_flags(archs: tuple[str, ...]) -> Iterator[str]:
    """Yield nvcc's flags: code for each architecture, and PTX where it says ``+PTX``."""
    for arch in archs:
        chip = arch.removesuffix("+PTX")
        yield f"-gencode=arch=compute_{chip},code=sm_{chip}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{chip},code=compute_{chip}"


def _escape(path: Path) -> str:
    """Escape a path for a ninja build line; ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _output(command: list[str]) -> str:
    """Return what a command prints; "" if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
