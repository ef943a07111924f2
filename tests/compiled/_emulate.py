"""Run a backend's host function unchanged, with its kernels compiled for a GPU and emulated on the CPU.

::

    with emulated(arch=90, seed=1) as launches:
        y, pre = grouped_linear.grouped_linear(x, ...)  # CPU tensors
    for kernel, stats in launches: ...

Needs a process in which ``TRITON_INTERPRET`` is not 1: see conftest.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import ptxsim
from ptxsim import triton_helpers
from torch import Tensor

from mixpert_kernels.backends.triton import _compile, _configs, _launch

from ._written import CHECKS, Written


class Launched(NamedTuple):
    """One launch; ``stats`` also has the compiled kernel, as ``stats.compiled`` (PTX, cubin, metadata)."""

    kernel: str
    stats: ptxsim.Stats


@contextlib.contextmanager
def emulated(
    arch: int = 90, *, row: int = 0, multiprocessors: int = 4, **launch_options: Any
) -> Iterator[list[Launched]]:
    """Replace ``_launch.launch`` by compiling for ``sm_<arch>`` and running the PTX in the emulator.

    Out-of-bounds accesses, races in shared memory, reads of uninitialised memory and deadlocks raise. ``_configs.chip``
    answers with the chip, so the configs are those shipped for it.

    Args:
        arch: 80 or 90 (the emulator has no tcgen05).
        row: which of the configs that serve a product; the first, by default, as without autotuning.
        multiprocessors: of the chip, for persistent grids.
        launch_options: of the emulator: ``seed``, ``resident_ctas``, ``interleave``, ``quantum``, ``split``, ...; they
            and the checks are listed in tests/ptxsim/README.md.

    Yields:
        The launches so far, in order: kernel name and counters.
    """
    launches: list[Launched] = []
    written = Written()
    options = CHECKS | launch_options

    def launch(kernel, grid, args, config):
        compiled = _compiled(kernel, args, config, _configs.nvidia(arch))
        values = {name: _wrap(args.get(name), written) for name in compiled.signature}
        stats = triton_helpers.run(compiled, tuple(grid), values, **options)
        stats.compiled = compiled
        launches.append(Launched(kernel.__name__, stats))

    before = _launch.launch, _configs.chip, _configs.fastest
    _launch.launch = launch
    _configs.fastest = lambda key, rows, run: rows[row]
    _configs.chip = lambda device: _configs.nvidia(arch, multiprocessors)
    try:
        with written:
            yield launches
    finally:
        _launch.launch, _configs.chip, _configs.fastest = before


_cache: dict[str, triton_helpers.Compiled] = {}


def _compiled(kernel: Any, args: dict[str, Any], config: Any, chip: Any) -> triton_helpers.Compiled:
    """Compile once a signature, and decode the PTX once."""
    signature = _compile.signature(kernel, args)
    key = repr((kernel.cache_key, signature, config.num_warps, config.num_stages, chip.arch))
    if key not in _cache:
        built = _compile.compile_launch(kernel, args, config, chip)
        ptx, meta = built.asm["ptx"], built.metadata
        parts = (ptxsim.load(ptx), meta.name, ptx, meta, signature.types, built.asm)
        _cache[key] = triton_helpers.Compiled(*parts)
    return _cache[key]


def _wrap(value: Any, written: Written) -> Any:
    """An argument as the emulator takes it: a tensor together with the map of its initialised bytes."""
    if isinstance(value, Tensor) and (known := written.of(value)) is not None:
        return ptxsim.Uninit(value, known)
    if type(value).__name__ == "TensorDescriptor":
        base = _wrap(value.base, written)
        return _Descriptor(
            base, *(getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "base")
        )
    return value


class _Descriptor(NamedTuple):
    """A ``TensorDescriptor`` whose base may be wrapped."""

    base: Any
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False
