"""What the build compiles and when: architectures by file, one object a source, launchers, warnings as errors."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from _build_tree import ROOT, Tree

# Compilers that leave an empty object, and in calls.txt their command lines.
FAKE = """
echo "${0##*/} $*" >> calls.txt
case "$*" in *--version*) exit 0;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; [ "$1" = -MF ] && echo "x:" > "$2"; shift; done
"""
# It says who it runs, then runs it.
LAUNCHER = 'echo "launched ${2##*/}" >> calls.txt; shift; exec "$@"'
pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="the build files are not beside the tests"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Two kernels, one of them for sm_90a, and compilers that compile nothing."""
    tree = Tree(tmp_path / "a tree")
    tree.kernel("twice")
    tree.kernel("twice_sm90a")
    tree.command("nvcc", FAKE)
    tree.command("c++", FAKE)
    tree.command("keep", LAUNCHER)
    return tree


def calls(tree: Tree, folder: str = "objects") -> list[str]:
    (place,) = (tree.root / "build").glob(f"{folder}*")
    return (place / "calls.txt").read_text().splitlines()


def archs_of(tree: Tree, folder: str = "objects") -> dict[str, list[str]]:
    """What each .cu file was compiled for."""
    found = {}
    for line in calls(tree, folder):
        name = re.search(r"/(\w+)\.cu ", line)
        if name:
            found[name[1]] = re.findall(r"-gencode=arch=\w+,code=(\w+)", line)
    return found


@pytest.mark.parametrize("archs", ["90a", "80+PTX;90a", "all"])
def test_sm90a_files_are_compiled_for_90a_alone(tree: Tree, archs: str) -> None:
    done = tree.objects(archs)
    assert done.returncode == 0, done.stdout + done.stderr
    found = archs_of(tree)
    assert found.pop("twice_sm90a") == ["sm_90a"]
    assert set(found) == {"device", "registry", "twice"}
    expected = {
        "90a": ["sm_90a"],
        "80+PTX;90a": ["sm_80", "compute_80", "sm_90a"],
        "all": ["sm_80", "compute_80", "sm_90a", "sm_100", "sm_120"],
    }
    assert set(map(tuple, found.values())) == {tuple(expected[archs])}


def test_sm90a_files_are_left_out_without_90a(tree: Tree) -> None:
    done = tree.build(MIXPERT_CUDA_ARCHS="80+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(archs_of(tree, "csrc")) == {"device", "registry", "twice"}
    (link,) = (line for line in calls(tree, "csrc") if " -shared " in line)
    assert "twice_cu.o" in link and "sm90a_cu.o" not in link
    assert tree.build(MIXPERT_CUDA_ARCHS="80+PTX;90a").returncode == 0
    assert "twice_sm90a_cu.o" in calls(tree, "csrc")[-1]  # linked anew, with it


def test_objects_are_linked_and_installed_nowhere(tree: Tree) -> None:
    assert tree.objects("80;90a").returncode == 0
    made = {path.name for path in (tree.root / "build" / "objects").glob("*.o")}
    assert made == {
        f"{n}.o" for n in ("bindings_cpp", "device_cu", "registry_cu", "twice_cu", "twice_sm90a_cu")
    }
    assert not [line for line in calls(tree) if "-shared" in line]
    assert not list(tree.root.rglob("_C*"))
    (tree.csrc / "cuda" / "twice.cu").unlink()
    assert tree.objects("80").returncode == 0
    left = {path.name for path in (tree.root / "build" / "objects").glob("twice*.o")}
    assert left == set()  # no object outlives its source, nor its architecture


def test_without_nvcc_objects_fail(tree: Tree) -> None:
    (tree.bin / "nvcc").unlink()
    done = tree.objects("all")
    assert done.returncode == 1
    assert done.stderr == "nothing compiled: nvcc was found neither in CUDA_HOME nor on PATH\n"


def test_a_launcher_runs_each_compiler_once(tree: Tree) -> None:
    launcher = {"MIXPERT_COMPILER_LAUNCHER": "keep --quiet"}
    assert tree.build(MIXPERT_CUDA_ARCHS="90a", **launcher).returncode == 0
    launched = sorted(line for line in calls(tree, "csrc") if line.startswith("launched"))
    assert launched == ["launched c++", *["launched nvcc"] * 4]  # but not the link


def test_a_compiler_with_a_launcher_of_its_own_gets_no_second(tree: Tree) -> None:
    tree.command("own", 'echo "own ${1##*/}" >> calls.txt; exec "$@"')
    launcher = {"MIXPERT_COMPILER_LAUNCHER": "keep --quiet", "CXX": "own c++ -m64"}
    done = tree.objects("80", **launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = calls(tree)
    assert [line for line in lines if "c++" in line and line.startswith("own")] == ["own c++"]
    assert sorted({line for line in lines if line.startswith("launched")}) == ["launched nvcc"]
    assert all("-ccbin c++" in line for line in lines if line.startswith("nvcc -c"))


def test_a_launcher_that_is_not_there_is_named(tree: Tree) -> None:
    done = tree.build(MIXPERT_COMPILER_LAUNCHER="ccaxhe")
    assert done.returncode != 0
    assert "MIXPERT_COMPILER_LAUNCHER must name a program, got 'ccaxhe'" in done.stderr


@pytest.mark.parametrize(
    "said",
    ["ptxas info : Potential Performance Loss: 'setmaxnreg' ignored", "x.cu(3): warning: unused"],
)
def test_objects_refuse_what_an_install_only_prints(tree: Tree, said: str) -> None:
    tree.command("nvcc", f'{FAKE}\necho "{said}" >&2')
    path = f"{tree.bin}:{os.defpath}"  # for grep
    done = tree.build(MIXPERT_CUDA_ARCHS="80", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    done = tree.objects("80", PATH=path)
    assert done.returncode == 1
    assert said in done.stderr
    assert not list((tree.root / "build" / "objects").glob("twice*.o"))
    assert tree.objects("80", PATH=path).returncode == 1  # again: it was not taken for made


@needs_nvcc
def test_what_changed_is_compiled_and_nothing_else(tree: Tree) -> None:
    (tree.bin / "nvcc").unlink()
    tree.kernel("thrice", 3)
    header = tree.csrc / "cuda" / "kernel.cuh"
    environment = {"PATH": f"{tree.bin}:{os.environ['PATH']}", "CXX": "g++"}

    def compiled() -> set[str]:
        done = tree.objects("90a", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return set(re.findall(r"/(\w+)\.(?:cu|cpp)'? -o", done.stdout))

    (tree.csrc / "bindings.cpp").write_text("int nothing;\n")  # it takes long
    (tree.csrc / "cuda" / "registry.cu").write_text("int nothing_either;\n")
    everything = {"bindings", "device", "registry", "twice", "thrice", "twice_sm90a"}
    assert compiled() == everything
    log = (tree.root / "build" / "objects" / "twice_cu.o.log").read_text()
    assert "Compiling entry function 'twice' for 'sm_90a'" in log
    assert re.search(r"Used \d+ registers", log)
    assert compiled() == set()
    tree.kernel("thrice", 4)
    assert compiled() == {"thrice"}
    header.write_text(header.read_text() + "\n")
    assert compiled() == {"twice", "thrice", "twice_sm90a"}
