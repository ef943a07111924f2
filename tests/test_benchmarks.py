"""The benchmarks' baselines compute what they are said to, and the report reads what they write."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

harness = importlib.import_module("_harness")
models = importlib.import_module("_models")
baselines = importlib.import_module("_baselines")
report = importlib.import_module("report")

LOOPS = ("naive_loop", "strong_loop", "grouped_mm", "gathered_bmm", "all_experts")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the harness takes the GPU; these checks are for float32"
)


@pytest.fixture(scope="module")
def plain() -> list:
    def tower(seed: int) -> torch.nn.Module:
        parts = models.vision_model(models.TINY), models.projector(models.TINY)
        return models.randomise(models.PlainTower(*parts), seed).eval()

    return [tower(seed) for seed in range(models.NUM_EXPERTS)]


def segment(name: str, plain: list, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    stacked = baselines.StackedWeights(plain)
    order, inverse, counts = baselines.Sorted.of(expert)
    if name == "naive_loop":
        return baselines.naive_loop(plain, x, expert)
    if name == "all_experts":
        return baselines.all_experts([tower.segment for tower in plain], expert, x)
    if name == "strong_loop":
        return baselines.strong_loop(stacked, x[order], counts)[inverse]
    if name == "gathered_bmm":
        return baselines.stacked_segment(stacked, x, expert, baselines.gathered_bmm(expert))
    linear = baselines.grouped_mm(expert[order])
    return baselines.stacked_segment(stacked, x[order], expert[order], linear)[inverse]


@pytest.mark.parametrize("expert", [[2], [0, 1, 2, 3], [3, 0, 3, 0, 1], [1, 1, 1]])
@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_baseline_gives_each_image_its_expert(name: str, expert: list[int], plain: list) -> None:
    if name == "grouped_mm" and (reason := baselines.grouped_mm_reason()):
        pytest.skip(reason)
    x = torch.randn(len(expert), models.TINY.tokens, models.TINY.hidden)
    truth = torch.cat([plain[e].segment(x[b : b + 1]) for b, e in enumerate(expert)])
    got = segment(name, plain, x, torch.tensor(expert))
    assert harness.error_of(got, truth) < 1e-5
    other = torch.cat([plain[(e + 1) % 4].segment(x[b : b + 1]) for b, e in enumerate(expert)])
    assert harness.error_of(got, other) > 0.1


def test_rows_for_a_gpu_say_so_on_a_cpu() -> None:
    for build in (lambda: baselines.captured(int), lambda: baselines.dense_gemm(None, None)):
        with pytest.raises(harness.Unavailable, match=r"GPU|CUDA device"):
            build()


def test_rows_for_a_gpu_compute_what_they_are_said_to(monkeypatch) -> None:
    monkeypatch.setattr(baselines, "DEVICE", torch.device("cuda"))

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def record(self, run):
            y = run()
            return y, lambda: y.copy_(run())

    monkeypatch.setattr("mixpert_kernels.hf.cuda_graph.CudaRecorder", Recorder)
    x, weight = torch.randn(3, 5, 8), torch.randn(6, 8)
    gemm = baselines.dense_gemm(x, weight)
    torch.testing.assert_close(gemm(), torch.nn.functional.linear(x, weight))
    replay = baselines.captured(gemm)
    x.mul_(2)
    torch.testing.assert_close(replay(), torch.nn.functional.linear(x, weight))


@torch.no_grad()
def test_plain_tower_is_the_transformers_model() -> None:
    model, projector = models.vision_model(models.TINY), models.projector(models.TINY)
    tower = models.PlainTower(model, projector)
    pixels = torch.randn(2, 3, models.TINY.image, models.TINY.image)
    model.post_layernorm = torch.nn.Identity()
    truth = projector(model(pixels).last_hidden_state)
    torch.testing.assert_close(tower(pixels), truth)


def test_arithmetic_is_counted_as_in_the_literature() -> None:
    full = models.SO400M
    assert full.tokens == 729
    assert full.layer_flop() == pytest.approx(24.65e9, rel=1e-3)
    assert full.segment_flop() == pytest.approx(74e9, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "expert"),
    [
        ("balanced", [0, 1, 2, 3, 0, 1, 2, 3]),
        ("skewed", [0, 1, 0, 2, 0, 3, 0, 1]),
        ("one_expert", [1] * 8),
    ],
)
def test_routes(kind: str, expert: list[int]) -> None:
    assert models.route_of(kind, 8).tolist() == expert


def test_wrong_variants_are_refused_and_missing_ones_explained(monkeypatch) -> None:
    monkeypatch.setattr(harness, "GEMM_SIDE", 32)
    monkeypatch.setattr(harness, "MAX_ROUNDS", 7)
    truth, calls = torch.ones(2, 3), []

    def variant(name: str, value: float):
        def call() -> torch.Tensor:
            calls.append(name)
            return truth * value

        return harness.Variant(name, lambda: call)

    def missing():
        raise harness.Unavailable("no such thing here")

    results = harness.measure(
        harness.Scenario(
            name="fake",
            truth=lambda: truth,
            base="right",
            variants=(
                variant("right", 1),
                variant("close", 1 + 1e-6),
                variant("wrong", 1.1),
                variant("nan", float("nan")),
                harness.Variant("missing", missing),
            ),
            flop=10.0,
        )
    )
    assert results["wrong"].wrong.startswith("off by 1.0e-01")
    assert results["nan"].wrong and not results["nan"].seconds
    assert results["missing"].unavailable == "no such thing here"
    assert len(results["right"].seconds) == len(results["close"].seconds) == 7
    assert results["right"].info["ratio"] == 1 and results["close"].info["gflops"] > 0
    rounds = calls[calls.index("nan") + 1 :][2:]  # the first two were for their memory
    assert all({*pair} == {"right", "close"} for pair in zip(*[iter(rounds)] * 2, strict=True))


def test_ratio_is_of_the_same_round() -> None:
    assert harness.paired_ratio([0.9, 9.0, 0.9, 0.9, 5.0], [1.0, 10.0, 1.0, 1.0, 1.0]) == 0.9
    assert harness.paired_ratio([7.0, 5.0, 1.7], [7.0, 10.0, 2.0]) == 0.85


def test_replay_hands_over_the_measured_seconds() -> None:
    replay, seconds, seen = harness.Replay(), [0.5, 0.125, 3.0], []
    replay.load(seconds)
    for _ in seconds:
        replay.rewind()
        start = replay.clock()
        replay.advance()
        seen.append(replay.clock() - start)
    assert seen == seconds


@pytest.fixture
def results(tmp_path: Path) -> Path:
    def entry(scenario: str, bench: str, variant: str, ratio: float, **info: float) -> dict:
        extra = dict(bench=bench, scenario=scenario, variant=variant, base="dense", ratio=ratio)
        extra |= dict(gemm_peak_gflops=190.0, peak_mb=12.5, **info)
        stats = dict(median=0.01 * ratio, iqr=0.001, rounds=7)
        return {"extra_info": extra, "stats": stats}

    benchmarks = [
        entry("expert segment, B=8", "expert segment", "all_experts", 4.0, gflops=30.0),
        entry(
            "expert segment, B=8",
            "expert segment",
            "ours",
            0.9,
            gflops=120.0,
            kept_mb=760.0,
            saved_mb=3.5,
        ),
        entry("expert segment, B=8", "expert segment", "dense", 1.0, gflops=110.0),
        entry("route (64), B=8", "route", "ours_reference", 1.5, gbytes_per_s=4.0),
        entry("route (64), B=8", "route", "something_new", 2.5, gbytes_per_s=2.0),
    ]
    machine = dict(size="ci", device="a machine", dtype="float32", threads=2)
    machine |= dict(torch="2.13", transformers="5.23")
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {"mixpert": machine}}))
    return path


def test_report(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables, picture = tmp_path / "out.md", tmp_path / "out.png"
    assert report.main([str(results), "--markdown", str(tables), "--png", str(picture)]) == 0
    lines = tables.read_text().splitlines()
    assert lines[0].startswith("a machine, threads: 2, float32, PyTorch 2.13")
    ours = next(i for i, line in enumerate(lines) if line.startswith("| **ours** |"))
    assert lines[ours] == "| **ours** | 9.00 | 1.00 | 0.900 | 120.0 |  | 12.5 | 760.0 | 3.5 |"
    assert lines[ours + 1].startswith("| dense |") and "GFLOP/s" in lines[ours - 2]
    assert any(line.startswith("| something_new |") for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "{}", '{"benchmarks": [], "machine_info": {"mixpert": {}}}'])
def test_report_refuses_other_files(text: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert report.main([str(path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"report: {path} must ") and message.count("\n") == 1
    assert report.main([str(tmp_path / "missing.json")]) == 1
