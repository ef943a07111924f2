"""The CPU backend: oneDNN's fused linear layer on weights reordered once."""

import torch


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"needs a CPU tensor, got {device}"
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return "this PyTorch was built without oneDNN"
    if dtype == torch.float64 or not dtype.is_floating_point:
        return f"has no {dtype}"
    return None
