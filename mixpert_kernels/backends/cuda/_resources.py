"""What the compiled kernels take, read from the machine code in an object or library; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mixpert_kernels.backends.chips import KB, blocks_a_multiprocessor

from . import _sass
from ._launch import Facts, parse

FACTS = re.compile(
    r"(?:_ZN7mixpert\d+)?([a-z]\w*)_factsE?"
)  # the variable, in the namespace or outside
COUNTS = ("mma", "ldmatrix", "cp_async", "other")
USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def rows(files: Iterable[Path], chips: Container[str] | None = None) -> list[dict[str, Any]]:
    """A row for each kernel and chip that the objects, libraries or cubins hold code for.

    Args:
        files: paths; files without code for a GPU give no row.
        chips: only these, such as ``sm_90a``.

    Returns:
        Dicts with ``kernel``, ``chip``; ``registers``, ``stack_bytes`` and ``local_bytes`` of a thread;
        ``spill_instructions`` (LDL and STL); ``shared_bytes`` of a block, static and dynamic;
        ``blocks_per_multiprocessor`` by registers, shared memory and threads; ``matrix_instruction``, with ``operands``
        of HGMMA, and the counts ``mma``, ``ldmatrix``, ``cp_async``, ``other`` of a turn of the main loop, which is
        ``k_steps`` steps of 16 (float32: of 1) along the summed dimension; None in kernels without a product.

    Raises:
        RuntimeError: There is no cuobjdump, or it fails.
    """
    tool = cuobjdump()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        places = [(path.resolve(), Path(folder) / str(i)) for i, path in enumerate(files)]
        cubins = [c for part in pool.map(lambda p: _extract(tool, *p), places) for c in part]
        if chips is not None:  # cuobjdump names them library.1.sm_80.cubin
            cubins = [c for c in cubins if c.stem.rpartition(".")[2] in chips]
        found = [
            row for part in pool.map(lambda c: list(_of_cubin(tool, c)), cubins) for row in part
        ]
    return sorted(found, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["chip"]))))


def cuobjdump() -> str:
    """NVIDIA's tool, from Triton's wheel or of the toolkit on ``PATH``.

    Raises:
        RuntimeError: It is in neither.
    """
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("kernels: cuobjdump is found neither in Triton nor on PATH")
    return found


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if done.returncode and "does not contain device code" not in said:
        raise RuntimeError(f"kernels: {' '.join(command)} failed: {said}")
    return done.stdout


def _extract(tool: str, path: Path, folder: Path) -> list[Path]:
    """The cubins in an object or library; a cubin itself."""
    if path.suffix == ".cubin":
        return [path]
    folder.mkdir()
    _run([tool, "-xelf", "all", str(path)], folder)
    return sorted(folder.glob("*.cubin"))


def _of_cubin(tool: str, cubin: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file's kernels on one chip."""
    image = cubin.read_bytes()
    described = facts(image)
    if not described:
        return
    text = _run([tool, "-res-usage", "-sass", str(cubin)], cubin.parent)
    chip = re.search(r"code for (sm_\w+)", text)
    assert chip, text[:200]
    arch = int(re.sub(r"\D", "", chip[1]))
    usage = {m[0]: [int(n) for n in m[1:]] for m in USAGE.findall(text)}
    code = _sass.functions(text)
    release = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", image)
    for kernel, (constants, _, _) in described.items():
        registers, stack, shared, local = usage[kernel]
        if arch >= 90:
            shared = max(0, shared - KB)  # where there is any, what CUDA keeps is counted in
        shared += constants["shared_bytes"]
        warps = constants["threads"] // 32
        area = _tile(constants)
        loop = _sass.main_loop(code[kernel]) if area else None
        yield {
            "kernel": kernel,
            "chip": chip[1],
            "threads": constants["threads"],
            "registers": registers,
            "stack_bytes": stack,
            "local_bytes": local,
            "spill_instructions": _sass.spills(code[kernel]),
            "shared_bytes": shared,
            "blocks_per_multiprocessor": blocks_a_multiprocessor(arch, registers, shared, warps),
            "matrix_instruction": loop and loop.product,
            "operands": (loop and loop.operands) or None,
            **{key: loop and getattr(loop, key) for key in COUNTS},
            "k_steps": loop and _k_steps(loop, area, warps),
            "other_per_mma": loop and round(loop.other_per_mma, 3),
            "nvcc": release and release[1].decode(),
        }


def _tile(constants: dict[str, int]) -> int:
    """Of a product, how many numbers a block computes; 0 in other kernels. A weight's gradient has no block_m."""
    columns = constants.get("block_n", 0)
    return columns * constants.get("block_m", constants.get("block_k", 0))


def _k_steps(loop: _sass.Loop, area: int, warps: int) -> float:
    """How many steps along the summed dimension a turn of the loop makes."""
    name, *shape = loop.product.split(".")
    if name == "HGMMA":  # of a warpgroup, each of which computes a block of its own
        rows, columns = map(int, shape[0].split("x")[:2])
        return loop.mma * rows * columns / area
    return loop.mma * warps * (16 * 8 if name == "HMMA" else 32) / area


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int


SYMBOLS = 2  # the kind of a section


def facts(cubin: bytes) -> dict[str, Facts]:
    """What the kernels in a cubin say of themselves (csrc/cuda/facts.h): the variables called ``<kernel>_facts``."""
    start = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [
        _Section(*struct.unpack_from("<4xI16xQQI", cubin, start + i * size)) for i in range(count)
    ]
    found = {}
    for table in (section for section in sections if section.kind == SYMBOLS):
        names = sections[table.link].offset
        for at in range(table.offset, table.offset + table.size, 24):
            name_at, home, value = struct.unpack_from("<I2xHQ", cubin, at)
            end = cubin.index(b"\0", names + name_at)
            named = FACTS.fullmatch(cubin[names + name_at : end].decode())
            if named and 0 < home < count:
                begin = sections[home].offset + value
                text = cubin[begin : cubin.index(b"\0", begin)]
                found[named[1]] = parse(text.decode())
    return found
