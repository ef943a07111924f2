"""The one place that launches kernels, so that a test can count launches or run them elsewhere."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor


class Config(Protocol):
    """What every row of ``_configs`` tells the compiler."""

    num_warps: int
    num_stages: int


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: Config) -> None:
    """Launch a kernel once, on the current stream of the device its tensors are on.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs in each dimension; numbers the host knows without waiting for the device.
        args: the kernel's arguments by name: tensors, descriptors, numbers, None and constexprs.
        config: gives the number of warps and of pipeline stages.
    """
    device = next(arg.device for arg in args.values() if isinstance(arg, Tensor))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[grid](**args, num_warps=config.num_warps, num_stages=config.num_stages)
