"""How much memory a call needs and how much a variant keeps."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()


def peak_megabytes(call: Callable[[], object]) -> float | None:
    """Memory one call needs beyond what was held before: result, temporaries, scratch space.

    On a GPU the allocator's peak; on Linux the resident set's high-water mark, which the kernel
    resets on request; elsewhere None.
    """
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if held_megabytes() is None:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_megabytes("VmRSS")
    call()
    return max(0.0, _status_megabytes("VmHWM") - before)


def saved_megabytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> float:
    """What autograd keeps of ``forward`` for backward, each storage once; storages of ``held`` are not counted."""
    known = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # holds what was packed: no address is given away twice
    del y
    return sum(kept.values()) / 1e6


def held_megabytes() -> float | None:
    """Memory held now: the allocator's on a GPU; on Linux the resident set, less free heap."""
    if ON_GPU:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status_megabytes("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_megabytes(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024 / 1e6
