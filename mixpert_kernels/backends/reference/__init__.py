"""The reference backend: the plainest PyTorch, any device, float64 too. It defines the ops."""

import torch


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point:
        return f"needs a floating dtype, got {dtype}"
    return None
