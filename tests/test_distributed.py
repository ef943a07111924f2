"""Two processes on a CPU, DDP and FSDP2, give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _distributed import CASES, PROCESSES, STEPS, run_case

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
    ),
    pytest.mark.usefixtures("one_thread"),  # as in the two processes
]
LIMIT = 1800  # seconds: ends what hangs; many times what a busy machine takes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, run once in two processes of one thread each."""
    folder = tmp_path_factory.mktemp("two")
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    script = [sys.executable, str(TESTS / "_distributed.py")]
    processes = []
    for rank in range(PROCESSES):
        command = [*script, str(rank), str(folder / "store"), str(folder)]
        log = (folder / f"log-{rank}").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(timeout=LIMIT)
    finally:
        for process in processes:
            process.kill()
    return folder


def result(folder: Path, name: str, rank: int) -> dict | str:
    path = folder / f"{name}-{rank}.pt"
    assert path.exists(), (folder / f"log-{rank}").read_text()[-2000:]
    found = torch.load(path, weights_only=True)
    if name in CASES:
        assert isinstance(found, dict), found
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {stage: run_case(f"{stage}-one", None) for stage in ("experts", "experts_head", "joint")}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, results: Path, alone: dict) -> None:
    """To 1e-6, in float64, after five steps; with an expert nobody hits and processes without images."""
    want = alone[case.partition("-")[0]]
    ranks = [result(results, case, rank) for rank in range(PROCESSES)]
    for got in ranks:
        assert got["weights"].keys() == want["weights"].keys()
        for name, value in want["weights"].items():
            assert (got["weights"][name] - value).abs().max() <= 1e-6, name
        assert got["norms"].keys() == want["norms"].keys()
        for name, norm in want["norms"].items():
            assert got["norms"][name] == pytest.approx(norm, rel=1e-6)
    for step, loss in enumerate(want["losses"]):  # what the mean over processes reports
        mean = torch.stack([got["losses"][step] for got in ranks]).mean()
        assert abs(mean - loss) <= 1e-6
    start = run_case_start(case)
    moved = max(float((v - start[n]).abs().max()) for n, v in want["weights"].items())
    assert moved > 1e-3  # the runs do something


def run_case_start(case: str) -> dict[str, torch.Tensor]:
    from _distributed import build

    model, _ = build(case.partition("-")[0], "one")
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("joint")])
def test_hits_are_everybodys(case: str, results: Path, alone: dict) -> None:
    want = [sum(e in [*first, *second] for first, second in STEPS) for e in range(4)]
    assert want == [4, 3, 3, 0]
    assert alone[case.partition("-")[0]]["steps"] == want
    start = run_case_start(case)
    for rank in range(PROCESSES):
        got = result(results, case, rank)
        assert got["steps"] == want
        for name, value in got["weights"].items():
            if name.startswith(("tower.experts", "tower.projector")):
                assert torch.equal(value[3], start[name][3]), name  # not by a bit


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("joint")])
def test_states_are_whole_tensors_of_any_number_of_processes(case, results, alone) -> None:
    want = alone[case.partition("-")[0]]["optimizer"]
    for rank in range(PROCESSES):
        got = result(results, case, rank)["optimizer"]
        assert got["names"] == want["names"] and got["shared_names"] == want["shared_names"]
        parts = [*zip(got["experts"], want["experts"], strict=True)]
        parts += [(got["shared"], want["shared"])] if want["shared"] else []
        for ours, theirs in parts:
            assert (ours["steps"], ours["shapes"]) == (theirs["steps"], theirs["shapes"])
            assert ours["state"].keys() == theirs["state"].keys()
            for i, state in theirs["state"].items():
                for key, value in state.items():
                    assert (ours["state"][i][key] - value).abs().max() <= 1e-6, (i, key)


def test_experts_sharded_apart_are_refused(results: Path) -> None:
    for rank in range(PROCESSES):
        message = result(results, "apart", rank)
        assert message.startswith("ExpertOptimizer: model must be sharded by fully_shard(")
        assert message.endswith("sharded along its experts")


def test_a_sharded_model_is_not_cloned(results: Path) -> None:
    for rank in range(PROCESSES):
        assert "must be cloned before it is sharded" in result(results, "cloned", rank)
