"""What the emulator is asked to check, and which bytes of a test's tensors hold a value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# Beyond the emulator's own checks: plain stores of two programs to one byte, and reads of shared memory nobody wrote.
CHECKS = {"check_global_races": True, "check_uninit_shared": True}


class Written(TorchDispatchMode):
    """Which bytes of the tensors made by ``torch.empty`` and its kin hold a value.

    They start as 0xFF (NaN in every float type). A kernel that reads a byte nobody wrote is an UninitializedRead, also
    when an earlier launch should have written it.
    """

    def __init__(self) -> None:
        super().__init__()
        # By the address of a storage, which the weak reference keeps from being another storage's later.
        self.maps: dict[int, tuple[StorageWeakRef, np.ndarray]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in EMPTY:
            self._track(result)
            return result
        for given, value in zip(func._schema.arguments, args, strict=False):
            if given.alias_info is not None and given.alias_info.is_write:
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor) and (written := self.of(tensor)) is not None:
                        written[:] = 1
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            tensor.new_empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
            unwritten = np.zeros(storage.nbytes(), np.uint8)
            self.maps[storage._cdata] = (StorageWeakRef(storage), unwritten)

    def of(self, tensor: Tensor) -> np.ndarray | None:
        """The map of the bytes that a tensor spans."""
        known = self.maps.get(tensor.untyped_storage()._cdata)
        if known is None or not tensor.numel():
            return None
        start = tensor.storage_offset() * tensor.element_size()
        steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return known[1][start : start + (sum(steps) + 1) * tensor.element_size()]
