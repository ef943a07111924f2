"""Flat global memory made of guarded buffers, and per-CTA shared memory."""
from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from .errors import LaunchError, MemoryFault

# Generic-address windows. Global buffers live far away from all of them.
SHARED_BASE = 0x0100_0000_0000
LOCAL_BASE = 0x0200_0000_0000
PARAM_BASE = 0x0300_0000_0000
MODULE_BASE = 0x1000_0000_0000
ARG_BASE = 0x7000_0000_0000
WINDOW = 0x0001_0000_0000
GUARD = 1 << 16
ALIGN = 512
WIDEST = 16  # bytes of an access

DT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Uninit:
    """Argument wrapper: the tensor's contents count as not yet written.

    The buffer is filled with a NaN pattern before the launch, and reading any
    byte of it before a store raises UninitializedRead. With ``written``, a byte
    map of the tensor's span, only its zeros count as not yet written, nothing is
    filled, and the launch marks in it what it stores: one map serves a chain of
    launches.
    """
    tensor: Any
    written: Optional[np.ndarray] = None


@dataclass
class Span:
    """Argument wrapper: pointer into a larger allocation.

    ``whole`` is the tensor whose full extent may be accessed; ``tensor`` gives
    the address passed to the kernel.
    """
    tensor: Any
    whole: Any


@dataclass
class Struct:
    """Argument wrapper: a struct passed by value.

    ``parts`` are (offset, value); a value is whatever an argument of its own may be: bytes, a tensor
    (its address is stored), ``Uninit``, ``Span`` or ``TensorMap``.
    """
    size: int
    parts: Any


def _is_torch(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr")


def _host_bytes(address: int, size: int) -> np.ndarray:
    """uint8 view of live host memory (the caller keeps its owner alive)."""
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))


def tensor_bytes(value: Any) -> tuple[int, np.ndarray]:
    """(host address, uint8 view of every byte the tensor spans)."""
    if _is_torch(value):
        if value.device.type != "cpu":
            raise LaunchError("only CPU tensors can be passed")
        item, start = value.element_size(), value.data_ptr()
        steps = [(n - 1) * s * item for n, s in zip(value.shape, value.stride())]
        empty = value.numel() == 0
    elif isinstance(value, np.ndarray):
        if not value.flags.writeable:
            raise LaunchError("numpy arrays must be writeable")
        item, start = value.itemsize, value.__array_interface__["data"][0]
        steps = [(n - 1) * s for n, s in zip(value.shape, value.strides)]
        empty = value.size == 0
    else:
        raise LaunchError(f"not a tensor: {type(value).__name__}")
    if empty:
        return start, np.empty(0, np.uint8)
    if min(steps, default=0) < 0:
        raise LaunchError("negative strides are not supported")
    return start, _host_bytes(start, item + sum(steps))


def _home(value: Any) -> tuple[int, int]:
    """(host address, size) of the allocation a tensor lives in."""
    if _is_torch(value):
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(value.base, np.ndarray):
        value = value.base
    start, raw = tensor_bytes(value)
    return start, raw.size


class Buffer:
    """A contiguous run of valid global bytes, lo to hi.

    ``raw`` begins at ``base``, a multiple of WIDEST just below lo: so an offset from base is as aligned as its address.
    """

    __slots__ = ("name", "base", "lo", "hi", "raw", "views", "rows", "init", "writer", "readonly")

    def __init__(self, name: str, base: int, raw: np.ndarray, lo: int):
        self.name = name
        self.base = base
        self.lo = lo
        self.hi = base + raw.size
        self.raw = raw
        self.views: dict = {}
        self.rows: dict = {}
        self.init: Optional[np.ndarray] = None
        self.writer: Optional[np.ndarray] = None
        self.readonly = False

    def view(self, dtype: Any) -> np.ndarray:
        """Typed 1-D view over the buffer."""
        out = self.views.get(dtype)
        if out is None:
            size = np.dtype(dtype).itemsize
            out = self.raw[: self.raw.size // size * size].view(dtype)
            self.views[dtype] = out
        return out

    def vec(self, dtype: Any, n: int) -> np.ndarray:
        """Typed view with rows of n elements."""
        out = self.rows.get((dtype, n))
        if out is None:
            size = np.dtype(dtype).itemsize * n
            out = self.raw[: self.raw.size // size * size].view(dtype).reshape(-1, n)
            self.rows[dtype, n] = out
        return out


class GlobalMemory:
    """All global buffers visible to a launch."""

    def __init__(self, parent: Optional["GlobalMemory"] = None):
        self.buffers: list[Buffer] = list(parent.buffers) if parent else []
        self._bases: list[int] = [b.lo for b in self.buffers]
        self._next = ARG_BASE
        self._storages: dict[int, int] = {}               # host allocation -> simulated base
        self._keep: list[Any] = []
        self._maps: list[tuple[np.ndarray, np.ndarray]] = []

    # -- registration
    def add_at(self, base: int, raw: np.ndarray, name: str, lo: Optional[int] = None) -> Buffer:
        """Register raw bytes at a fixed address, valid from lo on."""
        buf = Buffer(name, base, raw, base if lo is None else lo)
        at = bisect_right(self._bases, buf.lo)
        self.buffers.insert(at, buf)
        self._bases.insert(at, buf.lo)
        return buf

    def register_all(self, entries: list[tuple[str, Any, Any]]) -> list[int]:
        """Register (name, tensor, uninit) entries; returns their addresses.

        uninit is False, True, or the byte map of Uninit.written.

        Tensors that overlap or share storage keep their relative placement.
        """
        spans = []
        for name, tensor, uninit in entries:
            start, raw = tensor_bytes(tensor)
            self._keep.append(tensor)
            home, total = _home(tensor)
            spans.append((start, raw.size, raw, name, uninit, home))
            if home not in self._storages:
                self._storages[home] = self._next
                self._next += (max(total, start + raw.size - home) + ALIGN - 1) // ALIGN * ALIGN + GUARD
        addresses = []
        merged: dict[int, list] = {}
        for start, size, raw, name, uninit, home in spans:
            base = self._storages[home] + (start - home)
            addresses.append(base)
            if size:
                merged.setdefault(home, []).append((base, base + size, raw, name, uninit, start))
        for home, items in merged.items():
            items.sort(key=lambda s: (s[0], -s[1]))
            run: list = []
            end = -1
            for item in [*items, None]:
                if item is not None and run and item[0] <= end:
                    run.append(item)
                    end = max(end, item[1])
                    continue
                if run:
                    self._add_run(run, end)
                if item is not None:
                    run, end = [item], item[1]
        return addresses

    def _add_run(self, run: list, end: int) -> None:
        lo, host = run[0][0], run[0][5]
        base = lo - lo % WIDEST  # no lower than the allocation, which begins at a multiple
        size = end - base
        raw = run[0][2]
        if raw.size < size:
            raw = _host_bytes(host - (lo - base), size)
        names = []
        for item in run:
            if item[3] not in names:
                names.append(item[3])
        buf = self.add_at(base, raw, "/".join(names), lo)
        if any(item[4] is not False for item in run):
            buf.init = np.ones(size, np.uint8)
            for item in run:
                a, b = item[0] - base, item[1] - base
                if item[4] is True:
                    buf.init[a:b] = 0
                    raw[a:b] = 0xFF
                elif item[4] is not False:
                    buf.init[a:b] = item[4]
                    self._maps.append((item[4], buf.init[a:b]))

    def return_maps(self) -> None:
        """Write what a launch initialised back into the maps of Uninit.written."""
        for outer, inner in self._maps:
            outer[:] = inner

    # -- lookup
    def find(self, addr: int) -> Optional[Buffer]:
        """Buffer containing addr, or None."""
        at = bisect_right(self._bases, addr) - 1
        if at >= 0:
            buf = self.buffers[at]
            if addr < buf.hi:
                return buf
        return None

    def describe(self, addr: int) -> str:
        """Human-readable position of an address relative to the nearest buffer."""
        best, text = None, "no buffer is registered"
        for buf in self.buffers:
            if buf.lo <= addr < buf.hi:
                return f"inside {buf.name} at byte {addr - buf.lo} of {buf.hi - buf.lo}"
            gap = buf.lo - addr if addr < buf.lo else addr - buf.hi
            if best is None or gap < best:
                best = gap
                side = (f"{gap} bytes before" if addr < buf.lo else f"{gap} bytes past the end of")
                text = f"{side} {buf.name} ({buf.hi - buf.lo} bytes at {buf.lo:#x})"
        return text

    def region(self, addr: np.ndarray, size: int) -> Optional[tuple[Buffer, np.ndarray]]:
        """If all accesses fall in one buffer: (buffer, byte offsets); else None."""
        buf = self.find(int(addr[0]))
        if buf is None:
            return None
        rel = addr - np.uint64(buf.base)
        limit = buf.hi - buf.base - size
        bits = int(np.bitwise_or.reduce(rel))
        if bits > limit and int(rel.max()) > limit:
            return None
        if buf.lo > buf.base and int(addr.min()) < buf.lo:
            return None
        if bits & (size - 1):
            return None
        return buf, rel.view(np.int64)

    # -- slow path: diagnose or serve accesses that span several buffers
    def split(self, addr: np.ndarray, size: int, fault: Any) -> list[tuple[Buffer, np.ndarray, np.ndarray]]:
        """Partition accesses by buffer; fault(lane, addr, why) raises on bad ones."""
        bases = np.array(self._bases, np.uint64)
        slot = np.searchsorted(bases, addr, side="right") - 1
        bad = slot < 0
        highs = np.array([b.hi for b in self.buffers], np.uint64)
        safe = np.where(bad, 0, slot)
        if len(self.buffers) == 0:
            fault(0, int(addr[0]), "out-of-bounds")
        bad |= addr + np.uint64(size) > highs[safe]
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            fault(lane, int(addr[lane]), "out-of-bounds")
        off = addr & np.uint64(size - 1)
        if off.any():
            lane = int(np.flatnonzero(off)[0])
            fault(lane, int(addr[lane]), "misaligned")
        out = []
        for index in np.unique(slot):
            lanes = np.flatnonzero(slot == index)
            buf = self.buffers[int(index)]
            out.append((buf, (addr[lanes] - np.uint64(buf.base)).view(np.int64), lanes))
        return out

    def bytes_at(self, addr: int, size: int, what: str = "access") -> np.ndarray:
        """uint8 view of [addr, addr+size), which must lie in one buffer."""
        buf = self.find(addr)
        if buf is None or addr + size > buf.hi:
            raise MemoryFault(f"{what}: out-of-bounds global access of {size} bytes at {addr:#x}, {self.describe(addr)}")
        return buf.raw[addr - buf.base: addr - buf.base + size]


class SharedMemory:
    """One CTA slot's shared memory with an optional written-byte map."""

    __slots__ = ("raw", "size", "base", "views", "rows", "init", "gran", "shift")

    def __init__(self, size: int, base: int, track: bool, gran: int):
        pad = (size + 127) // 128 * 128
        self.raw = np.zeros(base + pad, np.uint8)
        self.size = base + size
        self.base = base
        self.views = {n: self.raw.view(dt) for n, dt in DT.items()}
        self.rows: dict = {}
        self.gran = gran
        self.shift = gran.bit_length() - 1
        self.init = np.zeros(len(self.raw) // gran + 1, bool) if track else None

    def reset(self, poison: bool) -> None:
        """Prepare for a new CTA."""
        self.raw.fill(0xFF if poison else 0)
        if self.init is not None:
            self.init.fill(False)

    def vec(self, dtype: Any, n: int) -> np.ndarray:
        """Typed view with rows of n elements."""
        out = self.rows.get((dtype, n))
        if out is None:
            out = self.raw.view(dtype).reshape(-1, n) if n > 1 else self.raw.view(dtype)
            self.rows[dtype, n] = out
        return out

    def granules(self, addr: np.ndarray, size: int) -> np.ndarray:
        """Shadow indices touched by accesses of `size` bytes at addr, shape [lanes, k]."""
        first = addr.astype(np.int64) >> self.shift
        k = max(1, size >> self.shift)
        if k == 1:
            return first[:, None]
        return first[:, None] + np.arange(k)

    def check_init(self, gran: np.ndarray) -> Optional[int]:
        """Index of the first lane reading a never-written granule, or None."""
        ok = self.init[gran]
        if ok.all():
            return None
        return int(np.flatnonzero(~ok.all(axis=1))[0])
