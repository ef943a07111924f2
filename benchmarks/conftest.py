"""Feeds the measurements of `_harness` to pytest-benchmark: a row a variant, a group a scenario."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _harness import DEVICE, DTYPE, GEMM_SIDE, SIZE, Replay, Result, Scenario, measure

HERE = Path(__file__).parent
REPLAY = Replay()
MEASURED: dict[tuple[object, ...], dict[str, Result] | Exception] = {}


def pytest_configure(config: pytest.Config) -> None:
    if "bench_*.py" not in config.getini("python_files"):
        config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=REPLAY.clock))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cuda = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    machine_info["mixpert"] = {
        "size": SIZE,
        "device": cuda or machine_info.get("cpu", {}).get("brand_raw", "CPU"),
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemm": f"{GEMM_SIDE} x {GEMM_SIDE} x {GEMM_SIDE}",
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the ratios: pytest-benchmark's own table knows of no baseline."""
    for results in MEASURED.values():
        if isinstance(results, Exception):
            continue
        timed = {name: result for name, result in results.items() if result.seconds}
        scenario = next(iter(timed.values())).info
        terminalreporter.section(f"{scenario['scenario']}, time / {scenario['base']}", sep="-")
        for name, result in sorted(timed.items(), key=lambda item: item[1].info["ratio"]):
            share = result.info.get("share_of_gemm_peak")
            peak = "" if share is None else f"{share:6.1%} of GEMM peak"
            terminalreporter.write_line(f"{name:24} {result.info['ratio']:7.3f}  {peak}")
        for name, result in results.items():
            if not result.seconds:
                terminalreporter.write_line(
                    f"{name:24} not timed: {result.unavailable or result.wrong}"
                )


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """``record(make, *args, variant=name)``: measure ``make(*args)`` once, report one variant."""

    def run(make: Callable[..., Scenario], *args: object, variant: str) -> None:
        key = (make, *args)
        if key not in MEASURED:
            try:
                MEASURED[key] = measure(make(*args))
            except Exception as failure:
                MEASURED[key] = failure
        results = MEASURED[key]
        if isinstance(results, Exception):
            raise results
        result = results[variant]
        if result.unavailable:
            pytest.skip(f"{variant}: {result.unavailable}")
        if result.wrong:
            pytest.fail(f"refused to time it: {result.wrong}", pytrace=False)
        benchmark.group = result.info["scenario"]
        benchmark.extra_info.update(result.info)
        REPLAY.load(result.seconds)
        benchmark.pedantic(REPLAY.advance, setup=REPLAY.rewind, rounds=len(result.seconds))

    return run


@pytest.fixture(scope="module", autouse=True)
def release_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drop a file's models before the next file builds its own."""
    yield
    setup = getattr(request.module, "setup", None)
    if setup is not None:
        setup.cache_clear()
        torch._dynamo.reset()
        gc.collect()
