"""Budgets of the compiled kernels: no spills, blocks that fit on a multiprocessor, a lean main loop.

What `pip install -e .` built is judged for sm_80. ``MIXPERT_OBJECTS=build/objects`` judges what
``python csrc/build_extension.py --objects all`` made, for every chip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixpert_kernels.backends.chips import SHARED_BYTES
from mixpert_kernels.backends.cuda import _resources

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CHIPS = ("sm_80", "sm_90a", "sm_100", "sm_120")
SPILLS = ("stack_bytes", "local_bytes", "spill_instructions")
# Blocks of the small tiles share a multiprocessor, so that one loads while another multiplies.
SMALL_BLOCKS = 2
# Of the large tiles' loop on sm_80: 64 x 64 a warp needs 0.25 ldmatrix a product; the rest are addresses and waiting.
OTHER_PER_MMA = 0.75
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def problems(row: dict[str, Any]) -> Iterator[str]:
    """Why a kernel must not be shipped."""
    name, chip = row["kernel"], row["chip"]
    for what in SPILLS:
        if row[what]:
            yield f"{what} {row[what]}"
    most = SHARED_BYTES[int(re.sub(r"\D", "", chip))]
    if row["shared_bytes"] > most:
        yield f"shared_bytes {row['shared_bytes']}, the chip has {most}"
    least = SMALL_BLOCKS if name.endswith("_small") else 1
    if row["blocks_per_multiprocessor"] < least:
        yield f"blocks_per_multiprocessor {row['blocks_per_multiprocessor']}, not {least}"
    product = row["matrix_instruction"] or "none"
    if (
        name.endswith(("_large", "_small"))
        and "_fp32" not in name
        and not product.startswith("HMMA")
    ):
        yield f"matrix_instruction {product}, not HMMA"
    if "_wgmma" in name and (not product.startswith("HGMMA") or row["operands"] != "shared"):
        yield f"matrix_instruction {product} of {row['operands']}, not HGMMA of shared memory"
    lean = name.endswith("_large") and chip == "sm_80" and product.startswith("HMMA")
    if lean and row["other_per_mma"] > OTHER_PER_MMA:
        yield f"other_per_mma {row['other_per_mma']}, the budget is {OTHER_PER_MMA}"


def declared(chip: str) -> set[str]:
    """The kernels that csrc/cuda has for a chip."""
    paths = (p for p in SOURCES.glob("*.cu") if chip == "sm_90a" or not p.stem.endswith("_sm90a"))
    return {n for p in paths for n in re.findall(r"^MIXPERT_KERNEL\((\w+),", p.read_text(), re.M)}


def built(chip: str) -> list[dict[str, Any]]:
    """The rows of what is built for a chip; skips where nothing is, or the sources are newer."""
    named = os.environ.get("MIXPERT_OBJECTS")
    if named:
        return _resources.rows(sorted(Path(named).glob("*.o")), {chip})
    if chip != "sm_80":
        pytest.skip("MIXPERT_OBJECTS names no objects of all chips")
    folder = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
    if not (folder / "_C.so").exists():
        pytest.skip("the extension was not built here")
    ninja = pytest.importorskip("ninja")
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-n", "-C", str(folder), "_C.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    rules = (folder / "build.ninja").read_text()
    new = [p.name for p in SOURCES.glob("*.cu") if p.name not in rules and "_sm90a" not in p.name]
    if "no work to do" not in done.stdout or new:
        pytest.skip("csrc/ has changed since the extension was built")
    rows = _resources.rows(sorted(folder.glob("*.o")), {chip})
    if not rows:
        pytest.skip("the extension was built without sm_80")
    return rows


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_keeps_to_its_budget(chip: str) -> None:
    rows = built(chip)
    made, wanted = {row["kernel"] for row in rows}, declared(chip)
    assert made == wanted, f"missing {sorted(wanted - made)}, left over {sorted(made - wanted)}"
    found = [f"{row['kernel']}: {text}" for row in rows for text in problems(row)]
    assert not found, "\n".join(found)


HUNGRY = """
#include "kernel.cuh"

struct HungryArgs {
#define FIELDS(FIELD) FIELD(const float*, x) FIELD(float*, y)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

struct HungryConfig {
  static constexpr int kThreads = 1024;  // so a thread has 64 registers, and holds 128 numbers until all are read
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 32;
  static constexpr void constants(mixpert::Facts& facts) { facts.constant("held", HELD); }
};

template <class Config>
__device__ void hungry_block(const HungryArgs& args) {
  __shared__ float tile[256];
  float held[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) held[i] = args.x[i * Config::kThreads + threadIdx.x];
  tile[threadIdx.x % 256] = held[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HELD; ++i) args.y[i * Config::kThreads + threadIdx.x] = held[i] * tile[i];
}

MIXPERT_KERNEL(hungry, HungryConfig, HungryArgs, hungry_block)
"""


def hungry(held: int, chip: str) -> dict[str, Any]:
    """The row of a kernel whose threads hold so many numbers."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "hungry.cu", Path(folder) / "hungry.cubin"
        source.write_text(HUNGRY.replace("HELD", str(held)))
        flags = ["-cubin", f"-arch={chip}", "-std=c++17", "-I", str(SOURCES)]
        subprocess.run(["nvcc", *flags, str(source), "-o", str(cubin)], check=True)
        (row,) = _resources.rows([cubin])
    return row


@needs_nvcc
@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_the_gate_refuses_a_kernel_that_spills(chip: str) -> None:
    row = hungry(128, chip)
    assert row["stack_bytes"] > 0 and row["spill_instructions"] > 0, row
    assert {text.split()[0] for text in problems(row)} == {"stack_bytes", "spill_instructions"}, row


@needs_nvcc
@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_what_a_row_says_is_so(chip: str) -> None:
    row = hungry(16, chip)
    assert not list(problems(row)), row
    assert (row["kernel"], row["chip"], row["threads"]) == ("hungry", chip, 1024), row
    assert row["shared_bytes"] == 256 * 4 + 32, row  # static and dynamic
    assert 16 < row["registers"] <= 64, row
    assert row["blocks_per_multiprocessor"] == (2 if row["registers"] <= 32 else 1), row
    assert row["matrix_instruction"] is None and row["mma"] is None, row
    assert re.fullmatch(r"\d+\.\d+\.\d+", row["nvcc"]), row


def test_the_gate_refuses_what_misses_a_budget() -> None:
    good = dict.fromkeys(SPILLS, 0) | {"kernel": "grouped_linear_bf16_large", "chip": "sm_80"}
    good |= {"shared_bytes": 96 * 1024, "blocks_per_multiprocessor": 1, "operands": None}
    good |= {"matrix_instruction": "HMMA.16816.F32.BF16", "other_per_mma": 0.75}
    wgmma = {"kernel": "grouped_linear_bf16_wgmma", "chip": "sm_90a", "operands": "shared"}
    wgmma["matrix_instruction"] = "HGMMA.64x128x16.F32.BF16"
    small = {"kernel": "grouped_linear_bf16_small", "blocks_per_multiprocessor": 2}
    for change in ({}, wgmma, small):
        assert not list(problems(good | change)), change
    for change in (
        {"stack_bytes": 8},
        {"local_bytes": 8},
        {"spill_instructions": 1},
        {"shared_bytes": 164 * 1024},
        {"blocks_per_multiprocessor": 0},
        {"other_per_mma": 0.76},
        {"matrix_instruction": "FFMA"},
        small | {"blocks_per_multiprocessor": 1},
        wgmma | {"operands": "registers"},
        wgmma | {"matrix_instruction": "HMMA.16816.F32.BF16"},
    ):
        assert len(list(problems(good | change))) == 1, change
