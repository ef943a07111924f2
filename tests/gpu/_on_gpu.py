"""What the tests of a GPU share."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import _towers
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixpert_kernels import FusedMixpertTower, Routing, backends
from mixpert_kernels.backends import triton

BACKENDS = ("triton", "cuda")
DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZE = _towers.KINDS["siglip"].size
EXPERTS = _towers.EXPERTS
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def tower(kind: str = "siglip", dtype: torch.dtype = torch.bfloat16, **options: object):
    return _towers.make(kind, **options).to(DEVICE, dtype)


def pixels(batch: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return _towers.pixels(batch, SIZE, seed).to(DEVICE, dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def routing(*expert: int) -> Routing:
    return Routing.forced(ids(*expert), EXPERTS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each GPU backend that can run here."""
    reason = backends.why_not("grouped_linear", request.param, device=DEVICE, dtype=torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def only(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``auto`` takes it, and no other."""
    monkeypatch.setattr(backends, "BACKENDS", (backend,))
    return backend


@pytest.fixture
def pinned() -> Iterator[None]:
    """One attention kernel, whatever the batch.

    PyTorch would choose by shape; and its flash attention splits the keys where tiles * heads leave multiprocessors
    idle, so that a tile alone is summed in another order than in a batch.
    """
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        yield


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Make it an error that the host waits for the device; what has to compile must have run before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def segment_inputs(made: FusedMixpertTower, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 729, _towers.WIDTH, generator=generator)
    return x.to(DEVICE, made.dtype)


def compiled_variants() -> int:
    """How many kernels Triton has compiled or loaded, by its own caches."""
    from triton.runtime.jit import JITFunction

    kernels = set()
    for found in pkgutil.iter_modules(triton.__path__):
        module = importlib.import_module(f"{triton.__name__}.{found.name}")
        kernels |= {k for k in vars(module).values() if isinstance(k, JITFunction)}
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())
