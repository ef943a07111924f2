"""The Triton backend: NVIDIA GPUs from sm_80 on, AMD as far as it compiles; without a GPU, Triton's interpreter.

Importing this package does not import triton: asking ``why_not`` of a machine without it is no error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"has no {dtype}"
    if device.type == "cpu":
        return _why_not_interpreted(dtype)
    if device.type != "cuda":
        return f"needs a CUDA or ROCm tensor, got {device}"
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # a build without CUDA, a machine without a driver
        return "PyTorch finds no GPU"
    if torch.version.hip is None and capability < (8, 0):
        return f"needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


def _why_not_interpreted(dtype: torch.dtype) -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA tensor, got cpu (TRITON_INTERPRET=1 runs it on the CPU)"
    if dtype == torch.bfloat16:
        return "the interpreter's bfloat16 products are wrong; float32 and float16 run on the CPU"
    return importlib.import_module(f"{__name__}._probe").why_not_interpreted()
