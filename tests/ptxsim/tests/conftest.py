"""Make the package importable when tests run from a checkout; leave Triton's tests out where kernels are interpreted."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# tests/compiled/test_ptxsim.py runs them in a process of their own.
collect_ignore = ["test_triton.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
