"""A GPU that is not there: fake CUDA tensors go through all host code of a GPU backend, and launches are noted.

Fake tensors have no values, so whatever the host code does is done for every routing; reading a value raises. ``gpu``
has the Triton backend and no other, ``cuda_gpu`` (tests/_fake_driver.py) the CUDA one.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixpert_kernels import ops
from mixpert_kernels.backends.chips import Chip, nvidia

OPS = [name for name in ops.__all__ if name.islower()]
ATTENTION = "attention"
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim")
# What only makes a view or memory.
FREE = (
    "view", "_unsafe_view", "reshape", "transpose", "permute", "unbind", "unsqueeze", "squeeze", "slice", "select",
    "expand", "split", "split_with_sizes", "t", "as_strided", "detach", "alias", "lift_fresh", "device", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_",
)  # fmt: skip


class HostWaits(AssertionError):
    """The host would have waited for the device."""


class Launch(NamedTuple):
    """A kernel's launch, or an op of torch that launches."""

    name: str
    kernel: Any = None
    args: dict[str, Any] | None = None
    config: Any = None


class _Watch(TorchDispatchMode):
    """Sees every op of torch: refuses those that the host waits for, notes those that launch."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        leaves = tree_leaves((args, kwargs))
        masks = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in leaves[1:]
        )
        if name in WAITS or masks:
            raise HostWaits(func._schema.name)
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*leaves, *tree_leaves(result)) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise HostWaits(f"{func._schema.name} between devices")
        same = name == "to" and result is args[0]
        if space == "aten" and name not in FREE and not same:
            self.launches.append(Launch(func._schema.name))
        return result


class FakeGpu:
    """A chip of compute capability 9.0 (``arch``)."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.arch = 90
        self._fake = FakeTensorMode()
        self._watch = _Watch(self.launches)

    @property
    def chip(self) -> Chip:
        return nvidia(self.arch, multiprocessors=132)

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Launch]]:
        """Yields the launches that are made within."""
        self.launches.clear()
        with warnings.catch_warnings(), self._fake, self._watch:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield self.launches

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        with self._fake:
            return torch.empty(shape, dtype=dtype, device="cuda")

    def move(self, module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Give a module fake CUDA parameters and buffers, in place."""
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is not None:
                    owner._parameters[name] = nn.Parameter(self.empty(*p.shape, dtype=dtype))
            for name, b in owner._buffers.items():
                if b is not None:
                    owner._buffers[name] = self.empty(*b.shape, dtype=b.dtype)
        return module

    def launch(self, kernel: Any, grid: tuple, args: dict[str, Any], config: Any) -> None:
        assert all(type(size) is int for size in grid), grid
        self.launches.append(Launch(kernel.fn.__name__, kernel, dict(args), config))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As PyTorch's flash attention: reads rows of any stride, writes (B, T, H, D) and shows it as (B, H, T, D)."""
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        self.launches.append(Launch(ATTENTION))
        batch, heads, tokens, width = q.shape
        return q.new_empty(batch, tokens, heads, width).transpose(1, 2)

    def run_on_fakes(self, run: Any) -> Any:
        """The op's implementation as its fake: ops within it are watched too."""

        def fake(*args: Any) -> Any:
            with self._watch:
                return run(*args)

        return fake


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A GPU with the Triton backend and no other."""
    made = FakeGpu()
    with serving(made, "triton", monkeypatch):
        launcher = importlib.import_module("mixpert_kernels.backends.triton._launch")
        monkeypatch.setattr(launcher, "launch", made.launch)
        yield made


@contextlib.contextmanager
def serving(made: FakeGpu, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All ops on fake CUDA tensors run this backend's host code; its launcher is for the caller to replace."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu")
    configs = importlib.import_module(f"mixpert_kernels.backends.{backend}._configs")
    monkeypatch.setattr("mixpert_kernels.backends.BACKENDS", (backend,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(made.arch, 10))
    monkeypatch.setattr(configs, "chip", lambda _: made.chip)
    monkeypatch.setattr(F, "scaled_dot_product_attention", made.attention)
    if not torch.backends.cuda.is_built():  # these two would look for the device
        monkeypatch.setattr(FakeTensor, "__getitem__", _getitem)
        monkeypatch.setattr(FakeTensor, "contiguous", _contiguous)
    with contextlib.ExitStack() as undo:
        for op in OPS:
            module = importlib.import_module(f"mixpert_kernels.ops.{op}")
            for name, run, fake in (
                (op, module._run, module._fake),
                (
                    f"{op}_backward",
                    getattr(module, "_run_backward", None),
                    getattr(module, "_fake_backward", None),
                ),
            ):
                if run is not None:
                    _set_fake(name, made.run_on_fakes(run))
                    undo.callback(_set_fake, name, fake)
        yield


def _set_fake(op: str, fake: Any) -> None:
    torch.library.register_fake(f"mixpert::{op}", fake, allow_override=True)


def _contiguous(self: Tensor) -> Tensor:
    if self.is_contiguous():
        return self
    return torch.ops.aten.clone(self, memory_format=torch.contiguous_format)


def _getitem(self: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        given = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (self.ndim - given)
    dim = 0
    for part in parts:
        if isinstance(part, Tensor):
            return torch.ops.aten.index.Tensor(self, [None] * dim + [part])
        if isinstance(part, int):
            self = self.select(dim, part)
            continue
        if part is None:
            self = self.unsqueeze(dim)
        elif part != slice(None):
            self = torch.ops.aten.slice.Tensor(self, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return self
