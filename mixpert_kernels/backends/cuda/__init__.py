"""The CUDA backend: kernels written by hand in csrc/cuda, for NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import functools

import torch

from mixpert_kernels import _build_info

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
build_info = functools.cache(_build_info.build_info)  # every call asks, and it reads a file


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"has no {dtype}"
    if device.type != "cuda":
        return f"needs a CUDA tensor, got {device}"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs"
    info = build_info()
    if not info.extension:
        return f"the extension is not built: {info.reason}"
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # a build without CUDA, a machine without a driver
        return "PyTorch finds no GPU"
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None
