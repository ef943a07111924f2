"""The emulator's own tests of Triton kernels, which the main process, being an interpreting one, cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ._worker import full

TESTS = Path(__file__).parents[1] / "ptxsim" / "tests"


@full
def test_the_emulator_runs_compiled_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton.py"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
