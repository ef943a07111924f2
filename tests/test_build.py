"""setup.py in every situation: with and without nvcc, without a C++ compiler, with a broken nvcc.

Each test builds a copy of the build files into a temporary folder. Every build runs with torch,
triton, transformers and numpy made impossible to import. What ninja is told: tests/test_build_rules.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from _build_tree import ROOT, Tree

from mixpert_kernels._build_info import BuildInfo, __version__, build_info, cuda_facts

ARCHS = {"MIXPERT_CUDA_ARCHS": "80;90a+PTX"}
# Of the trees in the arguments, in turn: import the package there and print what `mixpert info` says of the extension.
ASK = """
import contextlib, io, os, sys
import torch, transformers
for root in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, root)
        import mixpert_kernels
        from mixpert_kernels import cli
        assert mixpert_kernels.__file__.startswith(root), mixpert_kernels.__file__
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = cli.main(["info"])
        print(root, *out.getvalue().partition("compiled extension")[2].split(), sep=" ", flush=True)
        os._exit(status)
    assert os.wait()[1] == 0
"""
needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the build files are not beside the tests"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
pytestmark = needs_sources


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "a tree")  # the space is part of the test


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("compiled") / "a tree")
    tree.kernel("twice")
    tree.leave_old_library()
    done = tree.build(PATH=os.environ["PATH"], **ARCHS)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def call_extension(tree: Tree, code: str) -> str:
    """Run ``code`` in a new process that has the built ``_C`` and nothing else of the package."""
    done = subprocess.run(
        [sys.executable, "-c", f"import _C\n{code}"],
        env={**os.environ, "PYTHONPATH": str(tree.package)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_skip_cuda_installs_without_the_extension(tree: Tree) -> None:
    tree.leave_old_library()
    tree.command("nvcc", "exit 1")
    tree.command("c++", "exit 1")
    done = tree.build(MIXPERT_SKIP_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert tree.info() == BuildInfo(False, reason="MIXPERT_SKIP_CUDA=1")
    assert tree.libraries() == []
    assert "no compiled extension: MIXPERT_SKIP_CUDA=1" in done.stdout


def test_without_nvcc_installs_without_the_extension(tree: Tree) -> None:
    tree.leave_old_library()
    tree.command("c++", "exit 1")
    done = tree.build()
    assert done.returncode == 0, done.stderr
    assert tree.info().reason == "nvcc was found neither in CUDA_HOME nor on PATH"
    assert tree.libraries() == []


def test_without_cxx_installs_without_the_extension(tree: Tree) -> None:
    tree.leave_old_library()
    tree.command("nvcc", "exit 1")
    done = tree.build()
    assert done.returncode == 0, done.stderr
    assert tree.info().reason == "no C++ compiler was found (c++, g++, clang++)"
    assert tree.libraries() == []
    done = tree.build(CXX="no-such-compiler -m64")
    assert done.returncode == 0, done.stderr
    assert tree.info().reason == "no C++ compiler was found (CXX=no-such-compiler -m64)"


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
class TestFailingBuild:
    def test_failing_nvcc_fails_the_install_with_the_logs_tail(self, tree: Tree) -> None:
        tree.leave_old_library()
        tree.command("nvcc", "echo nvcc fatal: no licence for tuesdays >&2; exit 1")
        tree.command("c++", "exit 0")
        done = tree.build()
        assert done.returncode != 0
        assert "no licence for tuesdays" in done.stderr
        assert "MIXPERT_SKIP_CUDA=1" in done.stderr
        info = tree.info()
        assert (info.extension, info.reason) == (False, "the compilation failed")
        assert "no licence for tuesdays" in info.log_tail
        assert tree.libraries() == []

    def test_cuda_home_comes_before_path(self, tree: Tree) -> None:
        tree.command("nvcc", "echo the one on PATH; exit 1")
        home = tree.root / "cuda"
        shutil.copytree(tree.bin, home / "bin")
        (home / "bin" / "nvcc").write_text("#!/bin/sh\necho the one in CUDA_HOME\nexit 1\n")
        tree.command("c++", "exit 0")
        assert "the one in CUDA_HOME" in tree.build(CUDA_HOME=str(home)).stderr
        assert "the one on PATH" in tree.build(CUDA_HOME=str(tree.root / "nothing")).stderr

    @pytest.mark.parametrize("archs", ["sm_80", "8.0", "80;pascal", "80+ptx"])
    def test_unreadable_archs_are_named(self, tree: Tree, archs: str) -> None:
        tree.command("nvcc", "exit 1")
        tree.command("c++", "exit 1")
        done = tree.build(MIXPERT_CUDA_ARCHS=archs)
        assert done.returncode != 0
        assert "MIXPERT_CUDA_ARCHS must be" in done.stderr
        assert f"got {archs!r}" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
@pytest.mark.parametrize(
    ("smi", "wanted", "expected"),
    [
        ("exit 9", None, ["80+PTX"]),
        ("printf '9.0\\n9.0\\n8.6\\n7.5\\n'", None, ["86", "90a"]),
        ("printf '7.5\\n'", None, ["80+PTX"]),
        ("printf '9.0\\n'", "80;120+PTX 80", ["80", "120+PTX"]),
        ("printf '9.0\\n'", "all", ["80+PTX", "90a", "100", "120"]),
    ],
)
def test_archs(tree: Tree, smi: str, wanted: str | None, expected: list[str]) -> None:
    tree.command("nvcc", "exit 1")
    tree.command("c++", "exit 1")
    tree.command("nvidia-smi", smi)
    tree.build(**({"MIXPERT_CUDA_ARCHS": wanted} if wanted else {}))
    assert list(tree.info().archs) == expected
    held = {arch.removesuffix("+PTX") for arch in expected}
    assert {arch.removesuffix("+PTX") for arch in tree.info().left_out} == {
        "80",
        "90a",
        "100",
        "120",
    } - held


@needs_nvcc
def test_with_nvcc_compiles(compiled: Tree) -> None:
    info = compiled.info()
    assert info.extension, info.reason
    assert (info.archs, info.reason) == (("80", "90a+PTX"), None)
    assert info.nvcc and info.compiler
    (library,) = compiled.libraries()  # the old one is gone
    assert library.stat().st_size > 10_000


@needs_nvcc
def test_extension_answers_with_and_without_a_driver(compiled: Tree) -> None:
    assert int(call_extension(compiled, "print(_C.runtime_version())")) >= 11000
    assert int(call_extension(compiled, "print(_C.driver_version())")) >= 0
    code = """
try:
    print(_C.device_count())
except RuntimeError as error:
    print(error)
"""
    answer = call_extension(compiled, code)
    assert answer.isdigit() or answer.startswith("cudaGetDeviceCount: ")


@needs_nvcc
@pytest.mark.parametrize("name", ["device", "code_version"])
def test_cuda_error_is_a_python_exception_with_cudas_text(compiled: Tree, name: str) -> None:
    code = f"""
try:
    _C.{name}(1000)
except RuntimeError as error:
    print(error)
"""
    assert ": " in call_extension(compiled, code)


@needs_nvcc
def test_a_kernel_is_registered_and_says_what_it_takes(compiled: Tree) -> None:
    answer = call_extension(compiled, "print(_C.kernels())")
    facts = "threads=128;shared_bytes=0;block=128;P x;P y;i n;"
    assert answer == str({"twice": (facts, 24)})


@needs_nvcc
def test_a_launch_without_a_driver_an_unknown_kernel_and_arguments_of_another_size(
    compiled: Tree,
) -> None:
    code = """
for name, args in (("twice", bytes(24)), ("thrice", bytes(24)), ("twice", bytes(20))):
    try:
        _C.launch(name, 1000, 0, 1, args)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
"""
    refused, unknown, size = call_extension(compiled, code).splitlines()
    assert refused.startswith("RuntimeError: cuda")
    assert unknown == "ValueError: this build has no kernel thrice"
    assert size == "ValueError: twice takes 24 bytes of arguments, got 20"


@needs_nvcc
def test_second_build_compiles_nothing(compiled: Tree) -> None:
    done = compiled.build(PATH=os.environ["PATH"], **ARCHS)
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout
    assert len(compiled.libraries()) == 1


@needs_nvcc
def test_in_place_build_puts_the_library_into_the_source_tree(compiled: Tree) -> None:
    done = compiled.build("build_ext", "--inplace", PATH=os.environ["PATH"], **ARCHS)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (compiled.root / "mixpert_kernels").iterdir()}
    assert "_build.json" in names
    assert any(name.startswith("_C.") for name in names)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict:
    """What `mixpert info` says of the extension, with the package itself, in each of the four situations."""
    trees = {
        name: Tree(tmp_path_factory.mktemp("answers") / name) for name in ("skip", "nvcc", "c++")
    }
    trees["skip"].command("nvcc", "exit 1")
    trees["c++"].command("nvcc", "exit 1")
    built = {"skip": trees["skip"].build(MIXPERT_SKIP_CUDA="1")}
    built |= {name: trees[name].build() for name in ("nvcc", "c++")}
    assert [done.returncode for done in built.values()] == [0, 0, 0]
    if shutil.which("nvcc"):
        trees["compiled"] = request.getfixturevalue("compiled")
    places = {}
    for name, tree in trees.items():
        place = tmp_path_factory.mktemp("package")
        (place / "mixpert_kernels").mkdir()
        for path in (ROOT / "mixpert_kernels").iterdir():
            if path.name != "_build.json" and not path.name.startswith("_C."):
                (place / "mixpert_kernels" / path.name).symlink_to(path)
        for path in tree.package.iterdir():
            shutil.copy(path, place / "mixpert_kernels")
        places[str(place)] = name
    done = subprocess.run(
        [sys.executable, "-c", ASK, *places], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    return {name: said[place] for place, name in places.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        ("skip", "none: MIXPERT_SKIP_CUDA=1"),
        ("nvcc", "none: nvcc was found neither in CUDA_HOME nor on PATH"),
        ("c++", "none: no C++ compiler was found (c++, g++, clang++)"),
        pytest.param("compiled", "architectures 80, 90a+PTX nvcc ", marks=needs_nvcc),
    ],
)
def test_the_package_imports_and_info_says_why(
    answers: dict, situation: str, expected: str
) -> None:
    assert answers[situation].startswith(expected)
    assert situation != "compiled" or "CUDA runtime" in answers[situation]


def test_sdist_holds_every_file_of_the_repository(tree: Tree) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("there is no git repository around the tests")
    names = [name for name in listed.stdout.splitlines() if not name.startswith(".")]
    for name in names:
        place = tree.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    done = tree.build("sdist", MIXPERT_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree.root / "dist").glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(names) - held == set()
    assert not [name for name in held if name.endswith((".so", "_build.json"))]


def test_wheel_holds_a_fresh_record_and_no_sources(tree: Tree) -> None:
    (tree.root / "mixpert_kernels" / "_build.json").write_text('{"extension": true}')  # a stale one
    done = tree.build("bdist_wheel", MIXPERT_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree.root / "dist").glob("*.whl")
    assert path.name.startswith(f"mixpert_kernels-{__version__}-")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        record = json.loads(wheel.read("mixpert_kernels/_build.json"))
    assert record == {"extension": False, "reason": "MIXPERT_SKIP_CUDA=1"}
    assert not [name for name in names if name.startswith(("csrc", "tests"))]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"extension": true, "archs": 3}', "\xff", "{}"]
)
def test_build_info_never_fails(tmp_path: Path, text: str) -> None:
    path = tmp_path / "_build.json"
    path.write_bytes(text.encode("latin-1"))
    info = build_info(path)
    assert not info.extension
    assert info.reason and "_build.json" in info.reason
    path.unlink()
    assert "pip install" in (build_info(path).reason or "")


def test_cuda_facts_never_fails() -> None:
    facts = cuda_facts()
    assert facts.error or facts.devices
