"""Loading PTX modules and launching kernels."""
from __future__ import annotations

import re
import struct
import subprocess
import time
from typing import Any, Iterable, Optional, Sequence, Union

import numpy as np

from .errors import LaunchError, UnsupportedError
from .machine import Launch, Options
from .memory import ALIGN, GUARD, MODULE_BASE, PARAM_BASE, GlobalMemory, Span, Struct, Uninit, _is_torch
from .parser import ModuleAst, Var, parse
from .program import Decoder, Program
from .stats import AccessModel, Stats
from .tma import TensorMap

Dim = Union[int, Sequence[int]]


def _dim3(value: Dim) -> tuple[int, int, int]:
    items = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    items = (*items, 1, 1, 1)[:3]
    if min(items) < 1:
        raise LaunchError(f"bad dimensions {value}")
    return items                                                            # type: ignore[return-value]


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable C++ names by mangled name (identity if c++filt is missing)."""
    names = list(names)
    try:
        out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
        return dict(zip(names, out.stdout.split("\n")))
    except (OSError, subprocess.CalledProcessError):
        return {n: n for n in names}


class Module:
    """A loaded PTX module; module-scope variables persist between launches."""

    def __init__(self, text: str):
        self.ast: ModuleAst = parse(text)
        match = re.match(r"sm_(\d+)", self.ast.target)
        self.arch = int(match.group(1)) if match else 80
        self.memory = GlobalMemory()
        self.symbols: dict[str, int] = {}
        self._programs: dict[str, Program] = {}
        self._access = AccessModel()
        self._readable: Optional[dict[str, str]] = None
        self._place_globals()

    def _place_globals(self) -> None:
        at = MODULE_BASE
        placed: list[tuple[Var, Any]] = []
        for var in self.ast.vars.values():
            if var.space not in ("global", "const"):
                continue
            size = max(var.size, 1)
            raw = np.zeros(size, np.uint8)
            if var.init:
                raw[: len(var.init)] = np.frombuffer(var.init, np.uint8)
            buf = self.memory.add_at(at, raw, var.name)
            buf.readonly = var.space == "const"
            self.symbols[var.name] = at
            placed.append((var, raw))
            at += (size + ALIGN - 1) // ALIGN * ALIGN + GUARD
        for var, raw in placed:
            for offset, sym in var.init_syms:
                value = self.symbols.get(sym.name, 0) + sym.offset
                raw[offset: offset + 8] = np.frombuffer(struct.pack("<Q", value), np.uint8)

    # -- kernels
    @property
    def kernels(self) -> list[str]:
        """Mangled names of all entry points."""
        return [f.name for f in self.ast.functions.values() if f.is_entry]

    def readable_names(self) -> dict[str, str]:
        """Mangled -> demangled entry names."""
        if self._readable is None:
            self._readable = demangle(self.kernels)
        return self._readable

    def find(self, name: str) -> str:
        """Resolve an exact, demangled or partial kernel name."""
        if name in self.ast.functions and self.ast.functions[name].is_entry:
            return name
        readable = self.readable_names()
        squeeze = lambda s: s.replace(" ", "")                              # noqa: E731
        exact = [k for k, v in readable.items() if squeeze(v) == squeeze(name) or squeeze(v).split("(")[0] == squeeze(name)]
        hits = exact or [k for k, v in readable.items() if squeeze(name) in squeeze(v) or name in k]
        if len(hits) == 1:
            return hits[0]
        listing = "\n  ".join(readable.values())
        what = "matches several kernels" if hits else "matches no kernel"
        raise LaunchError(f"{name!r} {what}; available:\n  {listing}")

    def program(self, name: str) -> Program:
        """Decoded program of a kernel (cached)."""
        name = self.find(name)
        got = self._programs.get(name)
        if got is None:
            got = Decoder(self.ast.functions[name], self.ast, self.symbols, self.arch).decode()
            self._programs[name] = got
        return got

    def global_array(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        """Live view of a module-scope variable (for reading or setting it)."""
        hits = [s for s in self.symbols if s == name or name in s]
        if len(hits) != 1:
            raise LaunchError(f"{name!r} matches {len(hits)} module variables")
        buf = self.memory.find(self.symbols[hits[0]])
        assert buf is not None
        return buf.raw.view(dtype)

    # -- launching
    def launch(self, kernel: str, grid: Dim, block: Dim, args: Sequence[Any] = (), dynamic_smem: int = 0,
               **options: Any) -> Stats:
        """Run a kernel; tensors are updated in place. See Options for keywords."""
        prog = self.program(kernel)
        opts = Options(**options)
        grid3, block3 = _dim3(grid), _dim3(block)
        self._check_shape(prog, block3, dynamic_smem)
        gmem = GlobalMemory(self.memory)
        params, tracked = self._pack(prog, args, gmem)
        buf = gmem.add_at(PARAM_BASE, params, "kernel parameters")
        buf.readonly = True
        launch = Launch(prog, gmem, grid3, block3, params, dynamic_smem, opts, self.ast.files, self._access)
        begin = time.perf_counter()
        try:
            stats = launch.run()
        finally:
            gmem.return_maps()
        stats.seconds = time.perf_counter() - begin
        stats.shared_bytes = launch.shared_bytes
        stats.threads_per_cta = launch.threads
        for index, address, size in tracked:
            home = gmem.find(address)
            if home is not None and home.init is not None:
                part = home.init[address - home.lo: address - home.lo + size]
                stats.unwritten[index] = int(size - np.count_nonzero(part))
        return stats

    def _check_shape(self, prog: Program, block: tuple, dynamic: int) -> None:
        threads = block[0] * block[1] * block[2]
        limits = prog.fn.directives
        if threads > 1024:
            raise LaunchError(f"{threads} threads per block")
        want = limits.get("reqntid")
        if want and tuple((*want, 1, 1)[:3]) != block:
            raise LaunchError(f"kernel {prog.name} requires block {want}, launched with {block}")
        most = limits.get("maxntid")
        if most and threads > int(np.prod(most)):
            raise LaunchError(f"kernel {prog.name} allows at most {most} threads, launched with {block}")
        limit = (227 if self.arch >= 90 else 163) * 1024
        if prog.static_shared + dynamic > limit:
            raise LaunchError(f"{prog.static_shared + dynamic} bytes of shared memory exceed {limit}")
        cluster = limits.get("reqnctapercluster")
        if cluster and int(np.prod(cluster)) > 1:
            raise UnsupportedError(f"kernel {prog.name} needs clusters of {cluster} CTAs")

    def _pack(self, prog: Program, args: Sequence[Any], gmem: GlobalMemory) -> tuple[np.ndarray, list]:
        specs = list(prog.params.values())
        if len(args) != len(specs):
            raise LaunchError(f"kernel {prog.name} takes {len(specs)} arguments "
                              f"({', '.join(v.name + ':' + v.type + (f'[{v.size}]' if v.type == 'b8' else '') for _, v in specs)}), "
                              f"got {len(args)}")
        params = np.zeros(max(prog.param_size, 1) + 16, np.uint8)
        # Every value with where it goes: an argument as a whole, or a part of a struct.
        places: list[tuple[Any, int, Optional[Var], str]] = []
        for index, (arg, (offset, var)) in enumerate(zip(args, specs)):
            if not isinstance(arg, Struct):
                places.append((arg, offset, var, f"arg{index}"))
                continue
            if arg.size != var.size:
                raise LaunchError(f"argument {index} of {prog.name} needs {var.size} bytes, got {arg.size}")
            places += [(part, offset + at, None, f"arg{index}+{at}") for at, part in arg.parts]
        entries, order = [], []
        for index, (arg, _, _, label) in enumerate(places):
            if isinstance(arg, Uninit):
                entries.append((label, arg.tensor, True if arg.written is None else arg.written))
                order.append((index, "tensor"))
            elif isinstance(arg, Span):
                entries.append((label, arg.whole, False))
                order.append((index, "whole"))
                entries.append((label, arg.tensor, False))
                order.append((index, "tensor"))
            elif isinstance(arg, TensorMap):
                entries.append((label, arg.tensor, False if arg.written is None else arg.written))
                order.append((index, "map"))
            elif isinstance(arg, np.ndarray) or _is_torch(arg):
                entries.append((label, arg, False))
                order.append((index, "tensor"))
        addresses = gmem.register_all(entries)
        tracked = []
        where = {}
        for (index, role), address, entry in zip(order, addresses, entries):
            if role != "whole":
                where[index] = address
            if entry[2] is True:
                size = entry[1].numel() * entry[1].element_size() if _is_torch(entry[1]) else entry[1].nbytes
                tracked.append((index, address, size))
        for index, (arg, offset, var, _) in enumerate(places):
            raw = self._param_bytes(prog, index, arg, var, where)
            params[offset: offset + len(raw)] = np.frombuffer(raw, np.uint8)
        return params, tracked

    @staticmethod
    def _param_bytes(prog: Program, index: int, arg: Any, var: Optional[Var], where: dict) -> bytes:
        if isinstance(arg, TensorMap):
            raw = arg.encode(where[index])
        elif index in where:
            raw = struct.pack("<Q", where[index])
        elif var is None:
            return bytes(arg)
        elif arg is None:
            raw = bytes(max(var.size, 1))
        elif isinstance(arg, (bytes, bytearray)):
            raw = bytes(arg)
        elif isinstance(arg, (bool, int, np.integer)):
            size = max(var.size, 1)
            if var.type in ("f32", "f64"):
                raw = struct.pack("<f" if var.type == "f32" else "<d", float(arg))
            else:
                raw = (int(arg) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        elif isinstance(arg, (float, np.floating)):
            size = max(var.size, 1)
            if isinstance(arg, np.floating) and arg.itemsize == size:
                raw = arg.tobytes()
            else:
                raw = {2: lambda: np.float16(arg).tobytes(), 4: lambda: struct.pack("<f", arg),
                       8: lambda: struct.pack("<d", arg)}[size]()
        else:
            raise LaunchError(f"argument {index} of {prog.name}: cannot pass {type(arg).__name__}")
        if var is not None and len(raw) != max(var.size, 1):
            raise LaunchError(f"argument {index} of {prog.name} needs {max(var.size, 1)} bytes, got {len(raw)}")
        return raw


def load(ptx_text: str) -> Module:
    """Parse PTX text into a launchable module."""
    return Module(ptx_text)
