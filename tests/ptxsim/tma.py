"""Tensor maps: the host-side descriptors of tiled bulk copies."""
from __future__ import annotations

import struct
from typing import Any, Optional, Sequence

import numpy as np

from .errors import LaunchError

_MODES = {"none": 0, "32B": 1, "64B": 2, "128B": 3, 0: 0, 1: 1, 2: 2, 3: 3, 32: 1, 64: 2, 128: 3}
# Element type codes of cuTensorMapEncodeTiled and their sizes.
ELEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
TYPE_CODES = {"uint8": 0, "int8": 0, "uint16": 1, "int16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5,
              "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9, "float8_e4m3fn": 0, "float8_e5m2": 0, "bool": 0}
_FORMAT = "<QBBBBBBxx5I5Q5I5I"
assert struct.calcsize(_FORMAT) <= 128


class TensorMap:
    """Descriptor of an n-D tile of a global tensor (innermost dimension first in PTX).

    ``shape``, ``strides`` (elements) and ``box`` are given outermost first, like
    the tensor they describe. swizzle is "none", "32B", "64B" or "128B".
    """

    SIZE = 128

    def __init__(self, tensor: Any, box: Sequence[int], swizzle: Any = "none", shape: Optional[Sequence[int]] = None,
                 strides: Optional[Sequence[int]] = None, nan_fill: bool = False,
                 written: Optional[np.ndarray] = None):
        self.tensor = tensor
        self.written = written                           # as in Uninit
        self.box = [int(b) for b in box]
        self.shape = [int(s) for s in (shape if shape is not None else tensor.shape)]
        if strides is None:
            strides = tensor.stride() if hasattr(tensor, "element_size") else [s // tensor.itemsize for s in tensor.strides]
        self.strides = [int(s) for s in strides]
        if not (len(self.box) == len(self.shape) == len(self.strides) <= 5):
            raise LaunchError("tensor map rank mismatch")
        if self.strides[-1] != 1:
            raise LaunchError("the innermost dimension of a tensor map must be contiguous")
        if swizzle not in _MODES:
            raise LaunchError(f"unknown swizzle {swizzle!r}")
        self.mode = _MODES[swizzle]
        self.nan_fill = nan_fill
        self.elem = tensor.element_size() if hasattr(tensor, "element_size") else tensor.itemsize
        name = str(tensor.dtype).replace("torch.", "")
        self.type_code = TYPE_CODES.get(name, {1: 0, 2: 1, 4: 2, 8: 4}[self.elem])
        if any(b < 1 or b > 256 for b in self.box):
            raise LaunchError("tensor map box dimensions must be 1..256")
        limit = {0: 1 << 30, 1: 32, 2: 64, 3: 128}[self.mode]
        if self.box[-1] * self.elem > limit:
            raise LaunchError(f"inner box dimension of {self.box[-1] * self.elem} bytes exceeds the {limit}-byte swizzle")
        for s in self.strides[:-1]:
            if s * self.elem % 16:
                raise LaunchError("tensor map strides must be multiples of 16 bytes")

    def encode(self, address: int) -> bytes:
        """128-byte image understood by the simulator's TMA unit."""
        rank = len(self.box)
        dims = self.shape[::-1] + [1] * (5 - rank)
        strides = [s * self.elem for s in self.strides[::-1]][1:] + [0] * (6 - rank)
        box = self.box[::-1] + [1] * (5 - rank)
        return encode(address, rank, self.type_code, self.mode, self.nan_fill, dims, strides[:5], box, [1] * 5)


def encode(address: int, rank: int, type_code: int, mode: int, nan_fill: bool, dims: Sequence[int],
           strides: Sequence[int], box: Sequence[int], steps: Sequence[int]) -> bytes:
    """Pack fields (innermost first) into a 128-byte image."""
    raw = struct.pack(_FORMAT, address, rank, type_code, 0, mode, int(nan_fill), 1, *dims, *strides, *box, *steps)
    return raw.ljust(128, b"\0")


class Descriptor:
    """Decoded tensor map, fields innermost first."""

    def __init__(self, raw: bytes):
        v = struct.unpack_from(_FORMAT, raw)
        self.address, self.rank, self.type_code, _, self.mode, self.nan_fill, self.valid = v[:7]
        self.dims = v[7:12]
        self.strides = v[12:17]          # byte strides of dimensions 1..
        self.box = v[17:22]
        self.steps = v[22:27]
        self.elem = ELEM_BYTES.get(self.type_code, 0)

    @property
    def box_bytes(self) -> int:
        """Bytes one full box occupies in shared memory."""
        return int(np.prod([self.box[i] for i in range(self.rank)])) * self.elem

    def tile(self, coords: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(global byte addresses, in-bounds mask) for the box, outermost first."""
        shape = [self.box[i] for i in range(self.rank)][::-1]
        addr = np.full(shape, self.address, np.int64)
        ok = np.ones(shape, bool)
        for dim in range(self.rank):
            axis = self.rank - 1 - dim
            index = coords[dim] + np.arange(self.box[dim]) * max(1, self.steps[dim])
            view = [1] * self.rank
            view[axis] = -1
            stride = self.elem if dim == 0 else self.strides[dim - 1]
            addr = addr + (index * stride).reshape(view)
            ok = ok & ((index >= 0) & (index < self.dims[dim])).reshape(view)
        return addr.reshape(-1), ok.reshape(-1)

    def shared_offsets(self, start: int) -> np.ndarray:
        """Shared byte address of every box element, swizzled, outermost first."""
        n = self.box_bytes // self.elem
        addr = start + np.arange(n, dtype=np.int64) * self.elem
        if self.mode == 0:
            return addr
        mask = {1: 0x10, 2: 0x30, 3: 0x70}[self.mode]
        return addr ^ ((addr >> 3) & mask)


# Byte position of each field that tensormap.replace can set.
FIELD = {"global_address": (0, 8), "rank": (8, 1), "elemtype": (9, 1), "interleave_layout": (10, 1),
         "swizzle_mode": (11, 1), "fill_mode": (12, 1)}
DIMS_AT, STRIDES_AT, BOX_AT, STEPS_AT = 16, 36, 76, 96
# tensormap.replace numbers three element types differently from the host API.
DEVICE_TYPES = {8: 10, 9: 8, 10: 9}
