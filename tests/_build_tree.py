"""A copy of the build files in a temporary folder, to be built in every situation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mixpert_kernels._build_info import BuildInfo, build_info

ROOT = Path(__file__).resolve().parent.parent
RUN_SETUP = """
import runpy, sys
for name in ("torch", "triton", "transformers", "numpy"):
    sys.modules[name] = None  # importing it is now an ImportError
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""
# In the manner of csrc/cuda/kernel.cuh.
KERNEL = """
#include "kernel.cuh"

namespace mixpert {

struct NAME_Args {
#define FIELDS(FIELD) \\
  FIELD(const float*, x) \\
  FIELD(float*, y) \\
  FIELD(int, n)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

struct NAME_Config {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 2;
  static constexpr int kSharedBytes = 0;
  static constexpr void constants(mixpert::Facts& facts) { facts.constant("block", 128); }
};

template <class Config>
__device__ void NAME_block(const NAME_Args& args) {
  const int i = blockIdx.x * Config::kThreads + threadIdx.x;
  if (i < args.n) args.y[i] = MULTIPLIER * args.x[i];
}

MIXPERT_KERNEL(NAME, NAME_Config, NAME_Args, NAME_block)

}  // namespace mixpert
"""


def frame() -> list[Path]:
    """What is in csrc/ without the kernels, which take minutes to compile."""
    files = [path for path in (ROOT / "csrc").glob("*") if path.is_file()]
    cuda = ROOT / "csrc" / "cuda"
    return files + [
        *cuda.glob("*.h"),
        cuda / "kernel.cuh",
        cuda / "device.cu",
        cuda / "registry.cu",
    ]


class Tree:
    """A copy of the build files and of the extension's frame, with a package that holds next to nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        package = root / "mixpert_kernels"
        package.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
            shutil.copy(ROOT / name, root)
        self.csrc = root / "csrc"
        for path in frame():
            place = self.csrc / path.relative_to(ROOT / "csrc")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        shutil.copy(ROOT / "mixpert_kernels" / "_build_info.py", package)
        (package / "__init__.py").touch()
        (root / "README.md").touch()
        self.bin = root / "bin"
        self.bin.mkdir()
        self.package = root / "out" / "mixpert_kernels"

    def kernel(self, name: str, multiplier: int = 2) -> Path:
        """Write a file with one kernel, declared as those of csrc/cuda are."""
        path = self.csrc / "cuda" / f"{name}.cu"
        path.write_text(KERNEL.replace("NAME", name).replace("MULTIPLIER", str(multiplier)))
        return path

    def command(self, name: str, script: str) -> None:
        """Put a shell script on the builds' PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def build(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run setup.py; PATH holds the scripts alone unless it is given."""
        command = command or ("build_ext", "--build-lib", "out")
        return self.python("-c", RUN_SETUP, *command, **environment)

    def objects(self, archs: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Compile to objects in build/objects."""
        return self.python("csrc/build_extension.py", "--objects", archs, **environment)

    def python(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MIXPERT_", "CUDA"))}
        inherited.pop("CXX", None)
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env={**inherited, "PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def info(self) -> BuildInfo:
        return build_info(self.package / "_build.json")

    def libraries(self) -> list[Path]:
        return sorted(self.package.glob("_C*"))

    def leave_old_library(self) -> None:
        self.package.mkdir(parents=True, exist_ok=True)
        (self.package / "_C.cpython-39-x86_64-linux-gnu.so").write_text("old")
