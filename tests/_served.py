"""Whether a backend serves an op on this machine's CPU; where not, the reason is printed with the skip."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.backends import why_not


def skip_unless_served(op, backend, dtype=torch.float32):
    """Skip the test that runs, with the backend's own reason."""
    if reason := why_not(op, backend, device="cpu", dtype=dtype):
        pytest.skip(f"{backend}: {reason}")
