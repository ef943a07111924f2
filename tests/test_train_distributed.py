"""Two processes on a CPU train what one does: DDP and FSDP2, also where a process has no image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _recipes import captioned_folder, data, rows, stages, table, tiny_language, weights

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.training import Recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the two processes
HERE = Path(__file__).parent
# With AdamW a parameter whose gradient is rounding alone, such as a key's bias, moves by the whole rate: no two orders
# of summation agree there. SGD moves it by the rounding.
SGD = {"optimizer": "sgd", "lr": 0.05, "steps": 4}
TOLERANCE = 1e-6
# Every process fits the router by AdamW, from features that agree to rounding; so here AdamW has the last word.
ROUTER_TOLERANCE = 1e-5


def plan(root: Path) -> dict[str, dict]:
    """What the two processes run, by output; after the dash is the run of one process to compare with."""
    one = [{**stage, **({"batch": 1} if "batch" in stage else {})} for stage in stages(**SGD)]
    odd = [{**stage, **({"batch": 5} if "batch" in stage else {})} for stage in stages(**SGD)]
    few = [{**stage, **({"steps": 2} if "batch" in stage else {})} for stage in odd]
    made = {}
    for parallel in ("ddp", "fsdp"):
        made[f"{parallel}-odd"] = table(root, f"{parallel}-odd", parallel=parallel, stage=odd)
        made[f"{parallel}-one"] = table(root, f"{parallel}-one", parallel=parallel, stage=one)
        text = table(root / "text", parallel=parallel, stage=few)
        text["output"] = str(root / f"{parallel}-text")
        text["model"] = {k: v for k, v in text["model"].items() if k not in ("head", "projector")}
        text["model"]["language"] = str(root / "language")
        made[f"{parallel}-text"] = text
        stopped = table(root, f"{parallel}-resumed", parallel=parallel, stage=odd)
        made[f"{parallel}-stopped"] = {**stopped, "stop": 15}  # of 16 steps: after one checkpoint
        made[f"{parallel}-left"] = {
            **table(root, f"{parallel}-left", parallel=parallel, stage=odd),
            "stop": 15,
        }
        made[f"{parallel}-resumed"] = stopped
    return made


def launch(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "--local-addr", "127.0.0.1"]  # a port that it holds from the start
    done = subprocess.run(
        [*command, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with an unreadable image, the runs of two processes, and those of one."""
    root = data(tmp_path_factory.mktemp("distributed"))
    (root / "train" / "photo" / "red" / "torn.png").write_bytes(b"\x89PNG")
    for name in ("train", "test", "held_out"):
        captioned_folder(root / "text" / name)
    (root / "text" / "train" / "chart" / "0.txt").write_text("what ?\nred blue red tint")
    tiny_language(root / "language", tie_word_embeddings=True)
    made = plan(root)
    (root / "plan.json").write_text(json.dumps(list(made.values())))
    launch(root, str(HERE / "_train_worker.py"), str(root / "plan.json"))
    for name in ("odd", "one", "text"):
        settings = {**made[f"ddp-{name}"], "output": str(root / f"whole-{name}")}
        train(Recipe.from_dict(settings), progress=False)
    return root


def assert_close(root: Path, output: str, whole: str) -> None:
    got, want = weights(root / output), weights(root / whole)
    assert list(got) == list(want)
    for name, tensor in want.items():
        atol = ROUTER_TOLERANCE if ".router." in name else TOLERANCE
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["odd", "one", "text"])
def test_two_processes_train_what_one_does(parallel: str, name: str, root: Path):
    output = root / f"{parallel}-{name}"
    assert_close(root, output.name, f"whole-{name}")
    for got, want in zip(rows(output), rows(root / f"whole-{name}"), strict=True):
        for key in ("stage", "step", "images", "skipped"):
            assert got.get(key) == want.get(key)
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
            assert got["norm"].keys() == want["norm"].keys() and got["lr"] == want["lr"]
            assert got["norm"] == pytest.approx(want["norm"], rel=1e-3, abs=1e-5)
    results = [
        json.loads((path / "results.json").read_text()) for path in (output, root / f"whole-{name}")
    ]
    assert results[0]["domains"] == results[1]["domains"]
    assert FusedMixpertTower.from_pretrained(output / "tower").config.num_experts == 3
    if name != "text":
        assert len((output / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_without_images_was_there(parallel: str, root: Path):
    """The comparison above would prove little had every process had images."""
    for name, share in (("one", 0), ("odd", 2)):
        said = [
            json.loads((root / f"{parallel}-{name}" / f"counts{rank}.json").read_text())
            for rank in (0, 1)
        ]
        assert all(each == (parallel == "fsdp") for one in said for each in one["sharded"])
        first, second = (one["images"] for one in said)
        assert len(first) == len(second) == 16
        assert max(second) == share and max(first) == share + 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_checkpoints_know_nothing_of_the_number_of_processes(parallel: str, root: Path):
    """A run that two processes left half way goes on in two, and in one."""
    assert_close(root, f"{parallel}-resumed", "whole-odd")
    left = root / f"{parallel}-left"
    assert torch.load(left / "checkpoint.pt", weights_only=True)["step"] == 2
    settings = json.loads((root / "plan.json").read_text())
    made = next(row for row in settings if row["output"] == str(left))
    made.pop("stop")
    train(Recipe.from_dict({**made, "parallel": "ddp"}), progress=False)
    assert_close(root, left.name, "whole-odd")


def test_torchrun_of_the_command_line_prints_once(tmp_path: Path):
    root = data(tmp_path, each=1)
    text = """
output = "out"
device = "cpu"
[data]
train = "train"
test = "test"
experts = ["versatile", "photo", "chart"]
[model]
projector = 8
expert_layers = 1
head = "classifier"
siglip = { hidden = 16, layers = 2, heads = 2, image_size = 16, patch_size = 8 }
[[stage]]
name = "joint"
steps = 2
batch = 4
"""
    (root / "run.toml").write_text(text)
    done = launch(root, "-m", "mixpert_kernels.cli", "train", "run.toml")
    assert done.stdout.count("stage joint") == 1 and done.stdout.count("saved") == 1
    assert [row["step"] for row in rows(root / "out")] == [2]
