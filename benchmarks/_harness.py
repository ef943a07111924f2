"""Time variants of one computation against each other: interleaved, and only those that are right.

A `Scenario` is one batch and one routing; its `Variant`s compute the same thing. `measure` checks
every variant against the scenario's truth, refuses the wrong ones, and then runs rounds in which
each variant is called once, in a shuffled order: whatever slows the machine down slows them all. A
plain GEMM runs in the same rounds, so that the share of the machine's peak is a share of what the
machine gave at that time.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _memory import held_megabytes, peak_megabytes
from torch import Tensor

SIZES = ("ci", "default", "full")
SIZE = os.environ.get("MIXPERT_BENCH_SIZE", "default")
if SIZE not in SIZES:
    raise ValueError(f"MIXPERT_BENCH_SIZE must be one of {', '.join(SIZES)}, got {SIZE!r}")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

# Of |got - truth| / |truth|. Two fp32 summation orders differ by about 1e-6, a wrong expert by 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

GEMM = "gemm"
# Where a plain GEMM is fastest: larger ones leave a CPU's caches, smaller ones do not fill a GPU.
GEMM_SIDE = 8192 if DEVICE.type == "cuda" else 1024
MIN_ROUNDS = {"ci": 3, "default": 5, "full": 5}[SIZE]
MAX_ROUNDS = {"ci": 10, "default": 30, "full": 30}[SIZE]
BUDGET_SECONDS = {"ci": 0.5, "default": 5.0, "full": 20.0}[SIZE]  # of one scenario's rounds
_L2_FLUSH_BYTES = 256 * 2**20
# (geometry, variant) -> the most it was seen to keep: a later scenario finds it in place.
_KEPT: dict[tuple[object, str], float] = {}

Output = Tensor | tuple[Tensor, ...]


class Unavailable(Exception):
    """A variant that this machine or this version of a library cannot run; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a scenario's output."""

    name: str
    build: Callable[[], Callable[[], Output]]  # untimed; the call it returns is what is timed
    truth: Callable[[], Output] | None = (
        None  # where it computes another thing than the scenario's truth
    )
    info: dict[str, Any] = field(default_factory=dict)  # what is known of it besides its time


@dataclass(frozen=True)
class Scenario:
    """One batch and one routing, and everything that computes it."""

    name: str
    truth: Callable[[], Output]
    base: str  # the variant whose time is ratio 1
    variants: tuple[Variant, ...]
    flop: float = 0.0  # useful operations; work that a variant wastes is not counted
    moved: float = 0.0  # bytes any variant has to read and write, where memory is the limit
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What `measure` found out about one variant: `seconds`, or a reason why there are none."""

    seconds: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    wrong: str | None = None


def measure(scenario: Scenario) -> dict[str, Result]:
    """Check all variants of a scenario, then time the right ones in interleaved rounds."""
    with torch.no_grad():
        results, calls = _check(scenario)
        peaks = {name: peak_megabytes(call) for name, call in calls.items()}  # warms up, too
        calls[GEMM] = _gemm()
        seconds = time_interleaved(calls)
        gemm_rate = 2 * GEMM_SIDE**3 / min(seconds.pop(GEMM))
        for name in seconds:
            results[name].seconds = seconds[name]
            median = statistics.median(seconds[name])
            results[name].info |= scenario.info | {
                "scenario": scenario.name,
                "variant": name,
                "base": scenario.base,
                "ratio": paired_ratio(seconds[name], seconds[scenario.base]),
                "gemm_peak_gflops": gemm_rate / 1e9,
                "peak_mb": peaks[name],
            }
            if scenario.flop:
                results[name].info["gflops"] = scenario.flop / median / 1e9
                results[name].info["share_of_gemm_peak"] = scenario.flop / median / gemm_rate
            if scenario.moved:
                results[name].info["gbytes_per_s"] = scenario.moved / median / 1e9
    return results


def time_interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Call everything once a round, in an order shuffled anew; return the seconds of each call."""
    names, order = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - start > BUDGET_SECONDS:
                break
            order.shuffle(names)
            for name in names:
                seconds[name].append(time_call(calls[name]))
    finally:
        gc.enable()
    return seconds


def paired_ratio(seconds: list[float], base: list[float]) -> float:
    """Median of each round's ratio: a disturbance that lasts a round strikes both alike."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call: wall clock on a CPU; CUDA events, from a cold L2, on a GPU."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=DEVICE).zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def error_of(got: Output, truth: Output) -> float:
    """Largest relative error of an image, |got - truth| / |truth|; NaN stays NaN."""
    if isinstance(truth, tuple):
        return max(error_of(*pair) for pair in zip(got, truth, strict=True))
    if got.shape != truth.shape:
        raise ValueError(
            f"error_of: got must have shape {tuple(truth.shape)}, got {tuple(got.shape)}"
        )
    truth = truth.double().reshape(len(truth), -1)
    difference = (got.double().reshape(truth.shape) - truth).norm(dim=1)
    return float((difference / truth.norm(dim=1).clamp_min(1e-30)).max())


class Replay:
    """Hands measured times to pytest-benchmark: a clock that advances by one of them per round.

    pytest-benchmark can only run one test's rounds after another's, so the rounds are run here,
    interleaved, and its table and JSON are fed the seconds that were measured.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._rounds: Iterator[float] = iter(())

    def clock(self) -> float:
        return self._now

    def load(self, seconds: list[float]) -> None:
        self._rounds = iter(seconds)

    def rewind(self) -> None:
        self._now = 0.0

    def advance(self) -> None:
        self._now = next(self._rounds)


def _check(scenario: Scenario) -> tuple[dict[str, Result], dict[str, Callable[[], Output]]]:
    """Build each variant, compare its first output with the truth, return what may be timed."""
    results: dict[str, Result] = {}
    calls: dict[str, Callable[[], Output]] = {}
    gc.collect()
    truth = scenario.truth()
    for variant in scenario.variants:
        result = results[variant.name] = Result(info=dict(variant.info))
        expected = variant.truth() if variant.truth else truth
        held = held_megabytes()
        try:
            call = variant.build()
            got = call()
        except Unavailable as reason:
            result.unavailable = str(reason)
            continue
        error = error_of(got, expected)
        del got, expected
        after = held_megabytes()
        if held is not None and after is not None:
            key = (scenario.info.get("geometry"), variant.name)
            result.info["kept_mb"] = _KEPT[key] = max(_KEPT.get(key, 0.0), after - held)
        result.info["error"] = error
        if error <= TOLERANCE[DTYPE]:  # false for NaN
            calls[variant.name] = call
        else:
            result.wrong = f"off by {error:.1e} (allowed {TOLERANCE[DTYPE]:.0e})"
    if scenario.base not in calls:
        raise RuntimeError(
            f"{scenario.name}: {scenario.base} did not run: {results[scenario.base]}"
        )
    return results, calls


def _gemm() -> Callable[[], Tensor]:
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=DEVICE, dtype=DTYPE) for _ in range(2))
    a @ b.T  # the library's own start
    return lambda: a @ b.T
