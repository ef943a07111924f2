"""Compile mixpert_kernels._C where nvcc is found, and record what was built or why nothing was.

Used by setup.py. It imports the standard library and setuptools; ninja and pybind11 only once there
is something to compile. The extension links the CUDA runtime statically, and no path is derived from
nvcc's place, which may be that of a wrapper script.

``python csrc/build_extension.py --objects all`` compiles to objects in build/objects and links and
installs nothing; warnings are errors there. A new compiler's new warning must not fail an install.

Environment:
    MIXPERT_SKIP_CUDA=1: compile nothing.
    MIXPERT_CUDA_ARCHS: "80;90a", "80+PTX" or "all"; otherwise the GPUs that nvidia-smi shows.
    MIXPERT_COMPILER_LAUNCHER: a program that runs each compiler, such as "ccache".
    CUDA_HOME, PATH: where nvcc is looked for, in this order.
    CXX: the C++ compiler; otherwise c++, g++ or clang++.
    MAX_JOBS: how many compilers run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_rules import ROOT, SOURCES, Toolchain, ninja_lines, units  # noqa: F401

NAME = "mixpert_kernels._C"
# sm_80 code serves 86 and 89, and its PTX every later chip that has no code of its own.
ALL_ARCHS = ("80+PTX", "90a", "100", "120")
DEFAULT_ARCHS = ("80+PTX",)
LOG_LINES = 40


class NoExtension(Exception):
    """A reason to install without the extension. Not an error."""


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
        CompileError: ``MIXPERT_CUDA_ARCHS`` or ``MIXPERT_COMPILER_LAUNCHER`` cannot be read.
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
    return Toolchain(nvcc, _find_cxx(), find_archs(), _find_launcher())


def _find_launcher() -> tuple[str, ...]:
    words = shlex.split(os.environ.get("MIXPERT_COMPILER_LAUNCHER", ""))
    if not words:
        return ()
    found = shutil.which(words[0])
    if not found:
        raise CompileError(
            f"build: MIXPERT_COMPILER_LAUNCHER must name a program, got {shlex.join(words)!r}"
        )
    return (found, *words[1:])


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
        "left_out": left_out(toolchain.archs),
        "nvcc": version.group(1) if version else None,
        "compiler": compiler[0] if compiler else None,
    }


def left_out(archs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the architectures that ``all`` would add."""
    held = {arch.removesuffix("+PTX") for arch in archs}
    return tuple(arch for arch in ALL_ARCHS if arch.removesuffix("+PTX") not in held)


def compile_extension(toolchain: Toolchain, folder: Path) -> Path:
    """Compile what changed and link.

    Returns:
        The library's path.

    Raises:
        CompileError: A compiler failed; the message ends with the tail of its log.
    """
    _run_ninja(toolchain, folder, "_C.so", strict=False)
    return folder / "_C.so"


def compile_objects(toolchain: Toolchain, folder: Path) -> list[Path]:
    """Compile what changed to objects, with warnings as errors, and drop objects without a source.

    Returns:
        The objects' paths.
    """
    _run_ninja(toolchain, folder, "objects", strict=True)
    made = [folder / name for _, name, _ in units(toolchain.archs)]
    for old in set(folder.glob("*.o")) - set(made):
        old.unlink()
    return made


def _run_ninja(toolchain: Toolchain, folder: Path, target: str, *, strict: bool) -> None:
    try:
        import ninja
        import pybind11
    except ImportError as error:
        wanted = "--no-build-isolation needs `pip install setuptools ninja pybind11`"
        raise CompileError(f"build: {error}; {wanted}, or set MIXPERT_SKIP_CUDA=1") from None
    folder.mkdir(parents=True, exist_ok=True)
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    rules = "\n".join(ninja_lines(toolchain, includes, strict=strict)) + "\n"
    (folder / "build.ninja").write_text(rules, encoding="utf-8")
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-v", target]
    command += ["-k", "0"] if strict else []  # every file's warnings in one run
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-LOG_LINES:])
        hint = "set MIXPERT_SKIP_CUDA=1 to install without it"
        raise CompileError(f"build: {toolchain.nvcc} failed ({hint}). The log ends:\n{tail}")


def _output(command: list[str]) -> str:
    """Return what a command prints; "" if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(argv: list[str] | None = None) -> int:
    """Compile to objects; the exit status is 1 where nothing can be compiled."""
    parser = argparse.ArgumentParser(description="Compile csrc/ to objects; install nothing.")
    parser.add_argument("--objects", required=True, metavar="ARCHS", help='"all" or "80;90a"')
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "objects")
    args = parser.parse_args(argv)
    os.environ["MIXPERT_CUDA_ARCHS"] = args.objects
    try:
        made = compile_objects(find_toolchain(), args.folder)
    except (NoExtension, CompileError) as error:
        print(f"nothing compiled: {error}", file=sys.stderr)
        return 1
    print(f"{len(made)} objects in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
