"""``mixpert kernels``: what it prints, and that docs/kernels.md shows what docs/kernels.json holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mixpert_kernels import cli
from mixpert_kernels.cli import kernels

DOCS = Path(__file__).parents[1] / "docs"
KEYS = {
    "kernel",
    "config",
    "chip",
    "registers",
    "stack_bytes",
    "local_bytes",
    "spill_instructions",
    "shared_bytes",
    "matrix_instruction",
}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_docs = pytest.mark.skipif(not DOCS.exists(), reason="docs/ is not around the tests")


@needs_triton
def test_json_has_a_row_for_each_config(capsys):
    argv = ["kernels", "--chip", "sm_80", "--kernel", "sum_by_expert", "--defaults", "--json"]
    assert cli.main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(set(row) >= KEYS for row in rows)
    assert {row["kernel"] for row in rows} == {"sum_by_expert"}
    assert all(row["chip"] == "sm_80" and row["registers"] > 0 for row in rows)
    assert len({row["config"] for row in rows}) == len(rows)


@needs_triton
def test_the_segment_holds_to_its_bounds(capsys):
    """At most 8 launches a layer and 2 for the projector, attention included; little issued in vain."""
    assert cli.main(["kernels", "--segment", "--json", "--chip", "sm_90", "--chip", "sm_80"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for chip in ("sm_90", "sm_80"):
        launches = [row for row in rows if row["chip"] == chip]
        assert len(launches) + 2 <= 2 * 8 + 2
        useful, issued = (
            sum(row[f"{kind}_flops"] for row in launches) for kind in ("useful", "issued")
        )
        assert issued / useful <= 1.06
        for row in launches:
            bound = 1.066 if row["call"] in ("fc1", "fc2") else 1.054
            assert row["issued_flops"] <= bound * row["useful_flops"], row
            assert row["asked_bytes"] >= row["needed_bytes"], row


@needs_triton
def test_an_unknown_kernel_is_named(capsys):
    assert cli.main(["kernels", "--chip", "sm_80", "--kernel", "gemm"]) == 1
    assert "kernel must be one of" in capsys.readouterr().err


@needs_docs
def test_the_page_shows_the_rows_of_the_file():
    rows = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    assert (
        kernels.tables(rows, [{"chip": "sm_80", "call": "", "kernel": "", **_zero()}])["kernels"]
        in page
    )


def _zero() -> dict[str, int]:
    return dict.fromkeys(("useful_flops", "issued_flops", "needed_bytes", "asked_bytes"), 0)
