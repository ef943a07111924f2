"""The map of the repository: one word an op, and what each folder may do."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from mixpert_kernels import ops
from mixpert_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mixpert_kernels"
OPS = [name for name in ops.__all__ if name.islower()]
MAX_LINES = 400
VENDORED = ("tests/ptxsim/",)
BANNED_NAMES = ("utils.py", "helpers.py", "misc.py", "common.py")
needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the repository is not around the tests"
)
pytestmark = needs_sources


def sources() -> list[Path]:
    """The Python and C++ files of the project, committed or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.splitlines()
    if listed.returncode != 0:  # an archive without .git
        folders = ("mixpert_kernels", "tests", "benchmarks", "csrc")
        names = [str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.*")]
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h")
    return [ROOT / n for n in names if n.endswith(suffixes) and not n.startswith(VENDORED)]


def imports(path: Path) -> set[str]:
    """Top-level names of the modules a file imports, wherever in the file; relative ones are left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def calls(path: Path) -> set[str]:
    """Names of the methods a file calls."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }


def test_the_ops_are_known():
    assert OPS == [
        "adaptive_pool",
        "deform_attn",
        "grouped_adapter",
        "grouped_layer_norm",
        "grouped_linear",
        "grouped_mlp",
        "mix_streams",
        "norm_grouped_linear",
        "route",
        "route_grouped_linear",
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    [
        "mixpert_kernels/ops/{}.py",
        "mixpert_kernels/backends/reference/{}.py",
        "tests/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_an_op_has_one_word_and_all_its_places(op, place):
    assert (ROOT / place.format(op)).is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_a_folder_that_says_why_not(backend):
    assert "def why_not(" in (PACKAGE / "backends" / backend / "__init__.py").read_text()


def test_every_backend_folder_is_listed():
    folders = {p.parent.name for p in (PACKAGE / "backends").glob("*/__init__.py")}
    assert folders == set(BACKENDS)


@pytest.mark.parametrize(
    "module, folder",
    [("transformers", "hf"), ("triton", "backends/triton")],
)
def test_only_one_folder_imports_it(module, folder):
    allowed = PACKAGE / folder
    importers = [p for p in sources() if PACKAGE in p.parents and p.suffix == ".py"]
    importers = [p for p in importers if module in imports(p) and allowed not in p.parents]
    assert importers == []


def test_the_arithmetic_below_the_tower_does_not_know_of_it():
    """ops, backends and modules import neither hf nor training nor the command line."""
    for folder in ("ops", "backends", "modules"):
        for path in (PACKAGE / folder).rglob("*.py"):
            text = path.read_text()
            for above in ("hf", "training", "cli", "demo"):
                assert f"mixpert_kernels.{above}" not in text, path


def test_no_op_waits_for_the_device():
    for folder in ("ops", "backends/triton", "backends/cuda"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not calls(path) & {"item", "tolist", "cpu", "numpy"}, path


def test_ops_hold_no_arithmetic():
    """Torch alone, before any kernel language is imported."""
    for path in (PACKAGE / "ops").glob("*.py"):
        allowed = {"__future__", "collections", "dataclasses", "typing", "torch", "mixpert_kernels"}
        assert imports(path) <= allowed, path


def test_files_are_small_and_named_for_what_they_hold():
    for path in sources():
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
        assert path.name not in BANNED_NAMES, path
        assert not path.stem.endswith(("_v2", "_v3", "_new", "_old")), path


def test_no_file_keeps_work_for_later():
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    for path in sources():
        text = path.read_text()
        assert not any(mark in text for mark in marks), path


def test_public_ops_take_no_loose_keywords():
    for op in OPS:
        tree = ast.parse((PACKAGE / "ops" / f"{op}.py").read_text())
        function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == op)
        assert function.args.kwarg is None and function.args.vararg is None
        assert len(function.args.args) <= 8
        assert ast.get_docstring(function).count("Example:") == 1
