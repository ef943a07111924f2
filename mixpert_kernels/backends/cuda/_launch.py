"""The one place that launches the compiled kernels, so that a test can count launches or run them elsewhere."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_GRID = 2**31 - 1
# Sizes and alignments of the fields that csrc/cuda/facts.h names.
FIELDS = {"P": (8, 8), "i": (4, 4), "q": (8, 8), "f": (4, 4), "T": (128, 64)}
# CUtensorMapDataType and CUtensorMapSwizzle.
TENSOR_MAP_DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}


class Field(NamedTuple):
    """An argument's place in the struct a kernel takes."""

    code: str
    name: str
    offset: int


class Facts(NamedTuple):
    """What a kernel says of itself (csrc/cuda/facts.h)."""

    constants: dict[str, int]
    fields: tuple[Field, ...]
    size: int  # bytes of the arguments


class TensorMap(NamedTuple):
    """An argument that TMA reads a tensor through: boxes of this shape, outermost dimension first, 0 outside."""

    tensor: Tensor
    box: tuple[int, ...]
    swizzle: str = "128B"


def parse(text: str) -> Facts:
    """Read a kernel's facts.

    Example:
        >>> parse("threads=128;P x;i n;").fields[1]
        Field(code='i', name='n', offset=8)
    """
    constants, fields, end, widest = {}, [], 0, 1
    for item in text.split(";")[:-1]:
        name, equals, value = item.partition("=")
        if equals:
            constants[name] = int(value)
            continue
        code, name = item.split(" ")
        size, alignment = FIELDS[code]
        offset = -(-end // alignment) * alignment
        fields.append(Field(code, name, offset))
        end, widest = offset + size, max(widest, alignment)
    return Facts(constants, tuple(fields), -(-end // widest) * widest)


@functools.cache
def kernels() -> dict[str, Facts]:
    """The kernels of this build by name."""
    from mixpert_kernels import _C  # type: ignore[attr-defined,unused-ignore]

    found = {name: (parse(text), size) for name, (text, size) in _C.kernels().items()}
    for name, (facts, size) in found.items():
        if facts.size != size:
            raise RuntimeError(f"{name}: arguments of {size} bytes, described as {facts.size}")
    return {name: facts for name, (facts, _) in found.items()}


def pack(kernel: str, facts: Facts, args: dict[str, Any], encode: Any, address: Any) -> bytes:
    """The struct a kernel takes.

    Args:
        kernel: its name, for messages.
        facts: its layout.
        args: every field by name: tensors, None (a null pointer), TensorMaps, numbers.
        encode: TensorMap -> 128 bytes.
        address: Tensor -> int.

    Raises:
        ValueError: a name is missing or unknown, or a value does not fit its field.
    """
    if len(args) != len(facts.fields) or any(f.name not in args for f in facts.fields):
        names = {field.name for field in facts.fields}
        raise ValueError(f"{kernel}: wrong arguments: {sorted(names ^ set(args))}")
    raw = bytearray(facts.size)
    for code, name, offset in facts.fields:
        value = args[name]
        try:
            if code == "T":
                if type(value) is not TensorMap:
                    raise TypeError("it is a TensorMap")
                raw[offset : offset + 128] = encode(value)
            elif code == "P":
                struct.pack_into("Q", raw, offset, 0 if value is None else address(value))
            else:
                struct.pack_into("<" + code, raw, offset, value)  # "<": 1e39 is refused, not inf
        except (struct.error, OverflowError, TypeError) as error:
            given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"{kernel}: {name} must fit its field, got {given} ({error})"
            ) from None
    return bytes(raw)


def launch(kernel: str, grid: int, args: dict[str, Any]) -> None:
    """Launch a kernel once, on the current stream of the device its tensors are on.

    Args:
        kernel: one of ``kernels()``.
        grid: blocks; a number the host knows without waiting for the device. 0 launches nothing.
        args: the kernel's arguments by name: tensors, None, TensorMaps and numbers.

    Raises:
        ValueError: a size does not fit, tensors are on several devices, or this build has no such kernel.
        RuntimeError: CUDA refused; with its words, the kernel, the grid and the sizes.
    """
    if grid == 0:
        return
    if not 0 < grid <= MAX_GRID:
        raise ValueError(f"{kernel}: the grid must be at most {MAX_GRID} blocks, got {grid}")
    from mixpert_kernels import _C  # type: ignore[attr-defined,unused-ignore]

    if kernel not in kernels():
        raise ValueError(f"{kernel}: this build has no such kernel")
    device = _device(kernel, args)
    try:
        raw = pack(kernel, kernels()[kernel], args, _encode, Tensor.data_ptr)
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.launch(kernel, device.index, stream, grid, raw)
    except RuntimeError as error:
        sizes = ", ".join(f"{k}={v}" for k, v in args.items() if isinstance(v, int | float))
        raise RuntimeError(f"{kernel}: {error} (grid {grid}, {sizes})") from None


def _device(kernel: str, args: dict[str, Any]) -> torch.device:
    devices = {v.device for v in args.values() if isinstance(v, Tensor)}
    devices |= {v.tensor.device for v in args.values() if type(v) is TensorMap}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"{kernel}: tensors must be on one device, got {found}")
    return devices.pop()


def _encode(given: TensorMap) -> bytes:
    from mixpert_kernels import _C  # type: ignore[attr-defined,unused-ignore]

    tensor, box, swizzle = given
    strides = [s * tensor.element_size() for s in reversed(tensor.stride()[:-1])]
    return _C.tensor_map(
        tensor.data_ptr(),
        TENSOR_MAP_DTYPES[tensor.dtype],
        list(reversed(tensor.shape)),
        strides,
        list(reversed(box)),
        SWIZZLES[swizzle],
    )


def resident_blocks(kernel: str, device: torch.device) -> int:
    """How many blocks of a kernel one multiprocessor of the device holds."""
    return _resident_blocks(kernel, torch.cuda._utils._get_device_index(device, True))


@functools.cache
def _resident_blocks(kernel: str, index: int) -> int:
    from mixpert_kernels import _C  # type: ignore[attr-defined,unused-ignore]

    return _C.resident_blocks(kernel, index)
