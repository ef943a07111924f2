"""Compile @triton.jit functions ahead of time and run their PTX."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

import numpy as np

from .errors import LaunchError
from .memory import Span, Uninit, _is_torch
from .module import Module, load
from .stats import Stats
from .tma import TensorMap

_POINTER = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64", "int8": "*i8",
            "int16": "*i16", "int32": "*i32", "int64": "*i64", "uint8": "*u8", "uint16": "*u16", "uint32": "*u32",
            "uint64": "*u64", "bool": "*i1", "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5"}
_cache: dict = {}


@dataclass
class Compiled:
    """A compiled kernel and what is needed to launch it."""
    module: Module
    name: str
    ptx: str
    metadata: Any
    signature: dict
    asm: dict


def _unwrap(fn: Any) -> Any:
    """The JITFunction inside autotuners and heuristics."""
    from triton.runtime.jit import JITFunction
    while not isinstance(fn, JITFunction):
        inner = getattr(fn, "fn", None)
        if inner is None:
            raise LaunchError(f"{fn!r} is not a @triton.jit function (is TRITON_INTERPRET set?)")
        if not hasattr(inner, "fn") and not isinstance(inner, JITFunction):
            raise LaunchError("the function was decorated in interpreter mode; unset TRITON_INTERPRET")
        fn = inner
    return fn


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, (Uninit, Span)) else value


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ == "TensorDescriptor"


def _signature(value: Any) -> str:
    inner = _tensor(value)
    if _is_torch(inner) or isinstance(inner, np.ndarray):
        return _POINTER[str(inner.dtype).replace("torch.", "")]
    if _is_descriptor(inner):
        dtype = _POINTER[str(inner.base.dtype).replace("torch.", "")][1:]
        return f"tensordesc<{dtype}{list(inner.block_shape)}>"
    if isinstance(inner, bool):
        return "i1"
    if isinstance(inner, int):
        return "i32" if -2**31 <= inner < 2**31 else "i64" if inner < 2**63 else "u64"
    if isinstance(inner, float):
        return "fp32"
    raise LaunchError(f"cannot pass {type(inner).__name__} to a Triton kernel")


def _divisible(value: Any) -> bool:
    inner = _tensor(value)
    if _is_torch(inner):
        return inner.storage_offset() * inner.element_size() % 16 == 0
    if isinstance(inner, np.ndarray):
        return inner.base is None or inner.__array_interface__["data"][0] % 16 == 0
    return isinstance(inner, int) and not isinstance(inner, bool) and inner % 16 == 0


def compile(fn: Any, values: dict, arch: int = 80, num_warps: int = 4, num_stages: int = 3,
            types: Optional[dict] = None, options: Optional[dict] = None, specialize: bool = True) -> Compiled:
    """Compile for sample argument values (by parameter name).

    Values decide the signature the way Triton's launcher would: pointers and
    integers divisible by 16 are marked so, integers equal to 1 and None become
    constants. `types` overrides signature entries, e.g. {"n": "i64"}.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    jit = _unwrap(fn)
    types = types or {}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict = {}
    for index, param in enumerate(jit.params):
        name = param.name
        if name not in values:
            if not getattr(param, "has_default", False):
                raise LaunchError(f"missing argument {name!r}")
            values[name] = param.default
        value = values[name]
        fixed = param.is_constexpr or value is None
        special = specialize and not getattr(param, "do_not_specialize", False)
        if not fixed and special and name not in types and isinstance(value, int) and not isinstance(value, bool) and value == 1:
            fixed = True
        if fixed:
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = types.get(name) or _signature(value)
        aligned = special and not getattr(param, "do_not_specialize_on_alignment", False)
        if aligned and not signature[name].startswith("tensordesc") and _divisible(value):
            attrs[(index,)] = [["tt.divisibility", 16]]
    opts = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    key = (id(jit), jit.cache_key if hasattr(jit, "cache_key") else "", arch, repr(signature), repr(constants),
           repr(attrs), repr(sorted(opts.items())))
    got = _cache.get(key)
    if got is None:
        src = ASTSource(jit, signature=signature, constexprs=constants, attrs=attrs)
        built = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=opts)
        ptx = built.asm["ptx"]
        got = Compiled(load(ptx), built.metadata.name, ptx, built.metadata, signature, built.asm)
        _cache[key] = got
    return got


def _flatten(compiled: Compiled, values: dict) -> list:
    """Kernel arguments in PTX order, without the scratch pointers."""
    out: list = []
    metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    for name, sig in compiled.signature.items():
        if sig == "constexpr":
            continue
        value = values[name]
        if sig.startswith("tensordesc"):
            out += _descriptor_args(value, metas.pop(0) if metas else None)
        else:
            out.append(value)
    return out


def _descriptor_args(desc: Any, meta: Optional[dict]) -> list:
    shape, strides = list(desc.shape), list(desc.strides)
    if meta is None:
        return [desc.base, *shape, *strides, desc.padding == "nan", getattr(desc, "round_f32_to_tf32", False), *shape, *strides]
    base, written = (desc.base.tensor, desc.base.written) if isinstance(desc.base, Uninit) else (desc.base, None)
    tmap = TensorMap(base, list(meta["block_size"]), meta["swizzle"], shape, strides, desc.padding == "nan", written)
    return [tmap, *shape, *strides]


def compile_and_launch(fn: Any, grid: Union[int, tuple, Callable], *args: Any, arch: int = 80, num_warps: int = 4,
                       num_stages: int = 3, types: Optional[dict] = None, options: Optional[dict] = None,
                       launch: Optional[dict] = None, specialize: bool = True, **kwargs: Any) -> Stats:
    """Compile a @triton.jit function and run it in the simulator.

    Positional and keyword arguments are the kernel's own; `launch` holds
    simulator options (seed, resident_ctas, check_races, ...).
    """
    jit = _unwrap(fn)
    values = dict(zip([p.name for p in jit.params], args))
    values.update(kwargs)
    compiled = compile(fn, values, arch, num_warps, num_stages, types, options, specialize)
    if callable(grid):
        grid = grid(values)
    return run(compiled, grid, values, **(launch or {}))


def run(compiled: Compiled, grid: Union[int, tuple], values: dict, **launch: Any) -> Stats:
    """Launch an already compiled kernel with arguments by name."""
    meta = compiled.metadata
    shape = (grid,) if isinstance(grid, int) else tuple(grid)
    total = int(np.prod(shape))
    flat = _flatten(compiled, values)
    for size in (getattr(meta, "global_scratch_size", 0), getattr(meta, "profile_scratch_size", 0)):
        flat.append(np.zeros(total * size, np.uint8) if size else None)
    prog = compiled.module.program(compiled.name)
    flat = flat[: len(prog.params)]
    block = prog.fn.directives.get("reqntid") or [32 * meta.num_warps]
    return compiled.module.launch(compiled.name, grid=shape, block=tuple(block), args=flat, dynamic_smem=meta.shared, **launch)
