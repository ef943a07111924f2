"""Gates on the machine code of every kernel with every config shipped: no spills, little shared memory, tensor cores.

Together with docs/kernels.json they keep a row from getting worse unnoticed: ``mixpert kernels --json``
prints the new file where a row got better, or where getting worse is meant.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from mixpert_kernels.backends.triton import _catalogue, _compile, _costs

from ._worker import full

SNAPSHOT = Path(__file__).parents[2] / "docs" / "kernels.json"
# By chip: what multiplies float16, bfloat16 and TF32.
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
ALWAYS = ("sm_80", "sm_90", "sm_100", "sm_120")
SPILLS = ("stack_bytes", "local_bytes", "spill_instructions")
PARTS = 4  # a chip's kernels are shared out among so many tests


# Older compilers spill where this one does not: Triton 3.5 in the sm_120 products with descriptors.
JUDGES_SPILLS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)


def problems(row: dict, launch: _catalogue.Launch, chip: _catalogue.Chip) -> Iterator[str]:
    """Why a row must not be shipped."""
    for what in SPILLS:
        if row[what]:
            yield f"{what} {row[what]}"
    if row["shared_bytes"] > chip.shared_bytes:
        yield f"shared_bytes {row['shared_bytes']}, the chip has {chip.shared_bytes}"
    precision = launch.args.get("INPUT_PRECISION")
    expected = MATRIX.get(chip.name, "mma.sync")
    if precision == "tf32" and row["matrix_instruction"] != expected:
        yield f"matrix_instruction {row['matrix_instruction']}, not {expected}"
    if precision == "tf32x3" and row["matrix_instruction"] is None:
        yield "no matrix_instruction"


def regressions(row: dict, before: dict) -> Iterator[str]:
    """In what a row is worse than it was."""
    for what in (*SPILLS, "shared_bytes", "loop_instructions"):
        if (row[what] or 0) > (before[what] or 0):
            yield f"{what} {row[what]}, was {before[what]}"
    for what in ("blocks_per_multiprocessor", "pipeline_buffers"):
        if (row[what] or 0) < (before[what] or 0):
            yield f"{what} {row[what]}, was {before[what]}"


@functools.cache
def snapshot() -> dict[tuple[str, str, str], dict]:
    """The committed rows, if this Triton made them."""
    rows = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else []
    return {key(row): row for row in rows if row["triton"] == triton.__version__}


def key(row: dict) -> tuple[str, str, str]:
    return row["kernel"], row["config"], row["chip"]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("every_config", [False, pytest.param(True, marks=full)])
@pytest.mark.parametrize(
    "chip", [*ALWAYS, *(pytest.param(name, marks=full) for name in ("sm_86", "sm_89", "gfx942"))]
)
def test_machine_code(chip, every_config, part):
    on = _catalogue.CHIPS[chip]
    launches = _catalogue.launches(on, every_config)[part::PARTS]
    rows = [_costs.row(launch, on) for launch in launches if launch.default or every_config]
    found = []
    for launch, row in zip(launches, rows, strict=True):
        worse = regressions(row, snapshot().get(key(row), row))
        texts = [t for t in problems(row, launch, on) if JUDGES_SPILLS or not t.startswith(SPILLS)]
        found += [f"{key(row)}: {text}" for text in (*texts, *worse)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("every_config", [False, pytest.param(True, marks=full)])
@pytest.mark.parametrize(
    "chip", [*ALWAYS, *(pytest.param(name, marks=full) for name in ("sm_86", "sm_89", "gfx942"))]
)
def test_machine_code_for_packed_rows(chip, every_config, part):
    """The same gates; docs/kernels.json has no rows of these."""
    on = _catalogue.CHIPS[chip]
    launches = _catalogue.packed_launches(on, every_config)[part::PARTS]
    found = []
    for launch in launches:
        row = _costs.row(launch, on)
        texts = [t for t in problems(row, launch, on) if JUDGES_SPILLS or not t.startswith(SPILLS)]
        found += [f"{key(row)}: {text}" for text in texts]
    assert not found, "\n".join(found)


def test_the_snapshot_is_of_these_kernels():
    """Every row that this Triton makes by default is in docs/kernels.json, and nothing else is."""
    if not SNAPSHOT.exists():
        pytest.skip("docs/kernels.json is not around the tests")
    if not snapshot():
        made = {row["triton"] for row in json.loads(SNAPSHOT.read_text())}
        pytest.skip(f"docs/kernels.json is of Triton {made}, this is {triton.__version__}")
    kept = {key(row) for row in snapshot().values()}
    made = {
        (launch.kernel_name, launch.label, name)
        for name, chip in _catalogue.CHIPS.items()
        for launch in _catalogue.launches(chip)
    }
    assert kept == made, f"missing {sorted(made - kept)[:5]}, left over {sorted(kept - made)[:5]}"


@triton.jit
def _hungry_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    # A thread of the only warp holds BLOCK / 32 = 512 numbers until their maximum is known. It has 255 registers.
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x - tl.max(x, 0))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_the_gate_refuses_a_kernel_that_spills(chip):
    on = _catalogue.CHIPS[chip]
    x = torch.empty(1, device="meta")
    args = {"x_ptr": x, "y_ptr": x, "BLOCK": 16384}
    config = SimpleNamespace(num_warps=1, num_stages=1)
    launch = _catalogue.Launch("spills", "float32", _hungry_kernel, (1,), args, config, True)
    row = _costs.row(launch, on)
    assert any(text.startswith(SPILLS) for text in problems(row, launch, on)), row


def test_the_gate_refuses_a_product_without_tensor_cores_and_too_much_shared_memory():
    on = _catalogue.CHIPS["sm_90"]
    args = {"INPUT_PRECISION": "tf32"}
    launch = _catalogue.Launch("", "float16", None, (1,), args, None, True)
    row = dict.fromkeys(SPILLS, 0)
    row |= {"shared_bytes": 228 * 1024, "matrix_instruction": "mma.sync"}
    assert len(list(problems(row, launch, on))) == 2


def test_the_gate_sees_a_row_get_worse():
    row = {"stack_bytes": 0, "local_bytes": 0, "spill_instructions": 0, "shared_bytes": 1024}
    row |= {"loop_instructions": 100, "blocks_per_multiprocessor": 2, "pipeline_buffers": 3}
    assert not list(regressions(row, row))
    for what, value in (
        ("loop_instructions", 101),
        ("shared_bytes", 1025),
        ("pipeline_buffers", 1),
    ):
        assert list(regressions(row | {what: value}, row)) == [f"{what} {value}, was {row[what]}"]


def test_a_signature_is_what_triton_derives():
    """None, 1 and constexprs are constants, multiples of 16 marked, but for what asks not to be specialised."""

    @triton.jit(do_not_specialize=["batch"])
    def kernel(x_ptr, none_ptr, batch, one, sixteen, odd, BLOCK: tl.constexpr):
        pass

    x = torch.empty(64, dtype=torch.bfloat16)
    args = {"x_ptr": x, "none_ptr": None, "batch": 16, "one": 1, "sixteen": 32, "odd": 2**31}
    found = _compile.signature(kernel, args | {"BLOCK": 64})
    assert found.constants == {"none_ptr": None, "one": 1, "BLOCK": 64}, found
    assert found.types["x_ptr"] == "*bf16" and found.types["odd"] == "i64", found
    assert set(found.attributes) == {(0,), (4,), (5,)}, found
    assert set(_compile.signature(kernel, args | {"x_ptr": x[1:]}).attributes) == {(4,), (5,)}
