"""``mixpert kernels``: what it prints, and that docs/kernels.md shows what the JSON files beside it hold."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from mixpert_kernels import cli
from mixpert_kernels._build_info import BuildInfo
from mixpert_kernels.backends.cuda import _resources
from mixpert_kernels.cli import cuda_kernels, kernels

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


CUDA_ROW = {
    "kernel": "grouped_linear_bf16_large",
    "chip": "sm_90a",
    "threads": 128,
    "registers": 242,
    "stack_bytes": 0,
    "local_bytes": 0,
    "spill_instructions": 0,
    "shared_bytes": 49152,
    "blocks_per_multiprocessor": 2,
    "matrix_instruction": "HMMA.16816.F32.BF16",
    "operands": None,
    "mma": 192,
    "ldmatrix": 48,
    "cp_async": 24,
    "other": 40,
    "k_steps": 6.0,
    "other_per_mma": 0.583,
    "nvcc": "13.0.88",
}
NO_PRODUCT = CUDA_ROW | {"kernel": "route_bf16", "chip": "sm_80"}
NO_PRODUCT |= dict.fromkeys(
    ("matrix_instruction", "mma", "ldmatrix", "cp_async", "other", "k_steps", "other_per_mma")
)


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an object; reading it gives two rows."""
    (tmp_path / "x_cu.o").touch()
    made = [CUDA_ROW, NO_PRODUCT]
    monkeypatch.setattr(
        _resources,
        "rows",
        lambda files, chips: [row for row in made if not chips or row["chip"] in chips],
    )
    return tmp_path


def test_cuda_rows_are_of_the_objects(objects, capsys):
    argv = ["kernels", "--backend", "cuda", "--objects", str(objects)]
    assert cli.main(argv) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("kernel ") and "a k-step" in head
    assert "192:48:24:40" in first and "32:8:4:6.7" in first
    assert second.split() == [
        "route_bf16",
        *["sm_80", "128", "242", "0", "0", "49152", "2", "-", "-", "-", "-", "-"],
    ]
    for more, expected in (
        (["--chip", "sm_90"], [CUDA_ROW]),
        (["--kernel", "route_bf16"], [NO_PRODUCT]),
        (["--chip", "sm_80", "--chip", "sm_90", "--kernel", "route_bf16"], [NO_PRODUCT]),
    ):
        assert cli.main([*argv, *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected


def test_cuda_kernels_without_what_to_read(objects, capsys, monkeypatch):
    argv = ["kernels", "--backend", "cuda"]
    info = BuildInfo(False, reason="MIXPERT_SKIP_CUDA=1")
    monkeypatch.setattr("mixpert_kernels._build_info.build_info", lambda: info)
    for more, expected in (
        ([], "the extension is not built: MIXPERT_SKIP_CUDA=1"),
        (["--objects", str(objects / "none")], f"there are no objects in {objects / 'none'}"),
        (["--objects", str(objects), "--kernel", "gemm"], "kernel must be one of"),
        (["--objects", str(objects), "--segment"], "are for --backend triton"),
    ):
        assert cli.main([*argv, *more]) == 1
        assert expected in capsys.readouterr().err


def test_cuda_rows_are_written_between_their_marks(objects, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "kernels.md").write_text("a\n<!-- cuda -->\nold\n<!-- end of cuda -->\nb\n")
    argv = ["kernels", "--backend", "cuda", "--objects", str(objects), "--write", str(docs)]
    assert cli.main(argv) == 0
    assert json.loads((docs / "kernels_cuda.json").read_text()) == [CUDA_ROW, NO_PRODUCT]
    text = cuda_kernels.table([CUDA_ROW, NO_PRODUCT])
    page = f"a\n<!-- cuda -->\n```text\n{text}```\n<!-- end of cuda -->\nb\n"
    assert (docs / "kernels.md").read_text() == page


@needs_docs
def test_the_page_shows_the_cuda_kernels_that_there_are():
    rows = json.loads((DOCS / "kernels_cuda.json").read_text(encoding="utf-8"))
    assert cuda_kernels.table(rows) in (DOCS / "kernels.md").read_text(encoding="utf-8")
    sources = (DOCS.parent / "csrc" / "cuda").glob("*.cu")
    declared = {
        (name, chip)
        for path in sources
        for name in re.findall(r"^MIXPERT_KERNEL\((\w+),", path.read_text(), re.MULTILINE)
        for chip in ("sm_80", "sm_90a", "sm_100", "sm_120")
        if chip == "sm_90a" or not path.stem.endswith("_sm90a")
    }
    assert {(row["kernel"], row["chip"]) for row in rows} == declared
