"""A GPU that is not there, with values: which calls would have the host wait for it.

Tensors that are moved to it say that they are on ``cuda:0`` and are computed on the CPU, so that a whole model runs,
``generate`` included, and whoever asks a tensor for its device is answered as on a GPU. What reads such a tensor on the
host, or copies from the host and waits, is counted. The ops of this package run as one step: what their host code does
on a GPU is tests/test_triton_path.py's and test_cuda_path.py's to see.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "bincount",
    "unique_consecutive",
)  # fmt: skip
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, nn.Module.to}


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def put(tensor: Tensor) -> Tensor:
    if isinstance(tensor, OnGpu):
        return tensor
    kept = tensor.detach().as_subclass(OnGpu)
    return nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def take(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnGpu) else value


def move(module: nn.Module) -> nn.Module:
    """Put the parameters and buffers of a module on the GPU, in place."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            table.update({name: put(t) for name, t in table.items() if t is not None})
    return module


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Yields how often the host waited in this block, by what for: name of the op and the line that called it."""
    found: Counter[str] = Counter()

    def wait(what: str) -> None:
        calls = (f for f in traceback.extract_stack() if "/torch/" not in f.filename)
        line = [f for f in calls if f.filename != __file__][-1]
        found[f"{what} in {line.filename.rpartition('/')[2]}:{line.lineno}, {line.name}"] += 1

    with _Devices(wait), _Reads(wait):
        yield found


class _Devices(TorchFunctionMode):
    """Above PyTorch: what is made on, or moved to, the GPU is an ``OnGpu``."""

    def __init__(self, wait: Any) -> None:
        super().__init__()
        self.wait = wait

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MOVES:
            return self._move(func, args, kwargs)
        device = kwargs.get("device")
        if device is None or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        on_gpu = torch.device(device).type == "cuda"
        kwargs["device"] = "cpu"
        if not on_gpu:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.wait("copy from the host")
        return put(take(func(*args, **kwargs)))

    def _move(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        given = [*rest, *kwargs.values()]
        devices = [torch.device(g) for g in given if isinstance(g, str | torch.device)]
        devices += [g.device for g in given if isinstance(g, Tensor)]
        if func in (Tensor.cpu, Tensor.cuda):
            devices = [GPU if func is Tensor.cuda else torch.device("cpu")]
        to = devices[0].type if devices else tensor.device.type
        dtypes = [g.dtype if isinstance(g, Tensor) else g for g in given]
        dtypes = [d for d in dtypes if isinstance(d, torch.dtype)]
        if to != tensor.device.type and not kwargs.get("non_blocking"):
            self.wait(f"copy to {to}")
        moved = take(tensor) if to == "cpu" else put(tensor)
        return moved.type(dtypes[0]) if dtypes and dtypes[0] != moved.dtype else moved


class _Reads(TorchDispatchMode):
    """Below PyTorch: the ops that read on the host; results of the GPU's tensors are on the GPU."""

    def __init__(self, wait: Any) -> None:
        super().__init__()
        self.wait = wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        space, name = func._schema.name.split("::")
        if not any(isinstance(leaf, OnGpu) for leaf in leaves):
            return func(*args, **(kwargs or {}))
        indices = [t for t in leaves[1:] if isinstance(t, Tensor)] if "index" in name else []
        if name in READS or any(t.dtype == torch.bool for t in indices if name.startswith("index")):
            self.wait(name)
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            self.wait(name)
        if name.startswith("index") and any(not isinstance(t, OnGpu) for t in indices):
            self.wait("copy of an index")
        if space == "mixpert":
            args, kwargs = tree_map(take, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            return result
        return tree_map(lambda t: put(t) if isinstance(t, Tensor) else t, result)
