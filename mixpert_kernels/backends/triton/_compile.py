"""Compile a launch for a chip that need not be there, and read from the machine code what it costs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ._configs import Chip
from ._launch import Config

TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "bool": "i1",
}
SPILLS = re.compile(r"^\s*/\*[0-9a-f]+\*/.*?\b(?:LDL|STL)\b", re.MULTILINE)
# In the order in which they are looked for: a kernel for sm_90 may hold both warp-group and warp products.
MATRIX = {
    "tcgen05": r"tcgen05\.mma",
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"mma\.sync",
    "mfma": r"v_mfma_",
}
IN_SASS = re.compile(r"\b(?:HMMA|HGMMA|IMMA|DMMA|OMMA|UTC[A-Z]*MMA)\b")


@dataclass(frozen=True)
class Signature:
    """What Triton specialises a kernel by: names and types, constants, and what is divisible by 16."""

    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list]


def signature(kernel: Any, args: dict[str, Any]) -> Signature:
    """The signature that Triton's launcher derives from arguments by name.

    Constexprs, None and integers that are 1 become constants; pointers and integers divisible by 16 are marked so,
    unless the kernel asks for an argument not to be specialised.
    """
    found = Signature({}, {}, {})
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = args.get(name, parameter.default)
        special = not parameter.do_not_specialize
        one = special and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            found.types[name] = "constexpr"
            found.constants[name] = value
            continue
        found.types[name] = _type(value)
        aligned = special and not parameter.do_not_specialize_on_alignment
        if aligned and _divisible_by_16(value):
            found.attributes[(index,)] = [["tt.divisibility", 16]]
    return found


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[_name(value)]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[_name(value.base)]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _divisible_by_16(value: Any) -> bool:
    if isinstance(value, Tensor):
        start = value.storage_offset() * value.element_size()
        return (start if value.device.type == "meta" else value.data_ptr()) % 16 == 0
    return type(value) is int and value % 16 == 0


def compile_launch(kernel: Any, args: dict[str, Any], config: Config, chip: Chip) -> Any:
    """Compile what ``_launch.launch(kernel, ..., args, config)`` would compile on a chip.

    Args:
        kernel: a ``triton.jit`` function, in a process where kernels are not interpreted.
        args: as of ``launch``; tensors may be on the device ``meta``.
        config: gives the number of warps and of pipeline stages.
        chip: from ``_configs``.

    Returns:
        Triton's compiled kernel: ``asm`` by name, ``metadata``.
    """
    if type(kernel).__name__ == "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and kernels are interpreted, not compiled")
    types = signature(kernel, args)
    target = GPUTarget("cuda", chip.arch, 32) if chip.arch else GPUTarget("hip", chip.name, 64)
    source = ASTSource(kernel, types.types, types.constants, types.attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def facts(compiled: Any) -> dict[str, Any]:
    """What the machine code of a compiled kernel says.

    Returns:
        ``registers``, ``stack_bytes`` and ``local_bytes`` a thread; ``spill_instructions`` (a spill shows as stack or
        as LDL and STL, while local memory reads 0); ``shared_bytes`` a program; ``pipeline_buffers`` of the main loop's
        operands; ``loop_instructions`` of the shortest loop with a matrix product; ``matrix_instruction``.
    """
    meta = compiled.metadata
    found = {"shared_bytes": meta.shared, "pipeline_buffers": _buffers(compiled.asm["ttgir"])}
    found |= _of_cubin(compiled) if "cubin" in compiled.asm else _of_amdgcn(compiled)
    assembly = compiled.asm["ptx" if "cubin" in compiled.asm else "amdgcn"]
    names = (name for name, pattern in MATRIX.items() if re.search(pattern, assembly))
    return found | {"matrix_instruction": next(names, None)}


def _buffers(ttgir: str) -> int:
    """The leading dimension of the largest array of blocks in shared memory; 0 without any."""
    sizes = re.findall(r"local_alloc\b.*?!ttg\.memdesc<(\d+)x(?:\d+x)+\d+x", ttgir)
    return max(map(int, sizes), default=0)


def _of_cubin(compiled: Any) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    text = done.stdout + done.stderr
    sizes = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(sizes["REG"]),
        "stack_bytes": int(sizes["STACK"]),
        "local_bytes": int(sizes["LOCAL"]),
        "spill_instructions": len(SPILLS.findall(text)),
        "loop_instructions": _loop(text),
    }


def _loop(sass: str) -> int | None:
    """Instructions of the shortest loop that holds a matrix product."""
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    lengths = []
    for at, text in code:
        jump = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*`?\(?(?:0x)([0-9a-f]+)", text)
        if jump and (start := int(jump[1], 16)) <= at:
            body = [other for address, other in code if start <= address <= at]
            if any(IN_SASS.search(other) for other in body):
                lengths.append(len(body))
    return min(lengths, default=None)


def _of_amdgcn(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)[:1])

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "local_bytes": 0,
        "spill_instructions": field("vgpr_spill_count")
        + len(re.findall(r"\bscratch_(?:load|store)", text)),
        "loop_instructions": None,
    }
