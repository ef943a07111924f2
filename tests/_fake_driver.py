"""The compiled extension that is not there: all of ``backends/cuda`` but the kernels' own work runs on a fake GPU.

What kernels say of themselves is read from their PTX, which nvcc makes; arguments are packed and tensor maps encoded as
for a GPU, and what CUDA would refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _fake_gpu import FakeGpu, Launch, serving
from compiled import _emulate_cuda
from ptxsim import nvcc_helpers

import mixpert_kernels
from mixpert_kernels._build_info import BuildInfo
from mixpert_kernels.backends.cuda import _launch

THREADS = 2048  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that CUDA takes of a block


class FakeCuda(FakeGpu):
    """Made by the fixture ``cuda_gpu``; stands in for the module ``_C`` too."""

    @property
    def facts(self) -> dict[str, _launch.Facts]:
        return _emulate_cuda.kernels(90 if self.arch == 90 else 80)

    def note(self, kernel: str, grid: int, args: dict[str, Any]) -> None:
        """In place of ``_launch.launch``: notes it, and goes on to the driver."""
        assert type(grid) is int, grid
        if grid:
            self.launches.append(Launch(kernel, kernel, dict(args), grid))
        self._launch(kernel, grid, args)

    def launch(self, name: str, device: int, stream: int, grid: int, raw: bytes) -> None:
        facts = self.facts[name]
        assert 0 < grid <= _launch.MAX_GRID and len(raw) == facts.size, (name, grid, len(raw))
        if facts.constants["shared_bytes"] > self.chip.shared_bytes:
            raise RuntimeError(f"{name} takes more shared memory than {self.chip.name} has")

    def resident_blocks(self, name: str, index: int) -> int:
        """By threads and shared memory; registers could only lower it."""
        constants = self.facts[name].constants
        shared = constants["shared_bytes"] + RESERVED
        return min(THREADS // constants["threads"], (self.chip.shared_bytes + RESERVED) // shared)

    def tensor_map(
        self, address: int, dtype: int, sizes: list, strides: list, box: list, swizzle: int
    ) -> bytes:
        """The rules of cuTensorMapEncodeTiled."""
        size = {6: 2, 7: 4, 9: 2}[dtype]
        span = {0: 2**31, 1: 32, 2: 64, 3: 128}[swizzle]
        fine = (
            address % 16 == 0
            and len(sizes) == len(box) == len(strides) + 1 <= 5
            and all(0 < s <= 2**32 for s in sizes)
            and all(s % 16 == 0 and 0 < s < 2**40 for s in strides)
            and all(0 < b <= 256 for b in box)
            and box[0] * size % 16 == 0
            and box[0] * size <= span
        )
        if not fine:
            raise RuntimeError(f"no tensor map of {sizes}, {strides}, {box}, {swizzle}")
        return bytes(128)


@pytest.fixture
def cuda_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A GPU with the CUDA backend and no other."""
    if not nvcc_helpers.available():
        pytest.skip("nvcc is not on PATH")
    made = FakeCuda()
    info = BuildInfo(extension=True, archs=("80", "90a"))
    with serving(made, "cuda", monkeypatch):
        made._launch = _launch.launch
        monkeypatch.setattr(_launch, "launch", made.note)
        monkeypatch.setattr(_launch, "kernels", lambda: made.facts)
        monkeypatch.setattr(_launch, "_resident_blocks", made.resident_blocks)
        monkeypatch.setattr("mixpert_kernels.backends.cuda.build_info", lambda: info)
        monkeypatch.setattr(mixpert_kernels, "_C", made, raising=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
        yield made
