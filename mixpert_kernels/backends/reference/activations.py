"""The five activations and their derivatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")


def activate(name: str, z: Tensor) -> Tensor:
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if name == "relu":
        return F.relu(z)
    return z


def activate_backward(name: str, dy: Tensor, z: Tensor) -> Tensor:
    """Return dy * act'(z)."""
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dy, z)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
    if name == "quick_gelu":
        s = torch.sigmoid(1.702 * z)
        return dy * (s + 1.702 * z * s * (1 - s))
    if name == "relu":
        return dy * (z > 0)
    return dy
