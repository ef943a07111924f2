"""Seconds of calls that compute the same, taken in interleaved rounds: what slows the machine down slows them all."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 50
AT_LEAST = 2e-3  # seconds between two looks at the clock; shorter calls are repeated
MAX_REPEATS = 64
HOPELESS = 3.0  # times as slow as the fastest: MIN_ROUNDS are enough


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Call each once a round, in an order shuffled anew; return the seconds of a call in each round.

    Short calls follow each other without a pause, so on a GPU the time is the host's or the device's, whichever is
    longer.

    Args:
        calls: by name; each has run before.
        device: which one they run on.
        seconds: the rounds end after about as long, but there are at least MIN_ROUNDS.
    """
    names, order = list(calls), random.Random(0)
    repeats = {name: _repeats(seconds_of(call, device)) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS:
                if time.perf_counter() - start > seconds:
                    break
                typical = {name: statistics.median(found[name]) for name in names}
                names = [n for n in names if typical[n] <= HOPELESS * min(typical.values())]
            order.shuffle(names)
            for name in names:
                found[name].append(seconds_of(calls[name], device, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return found


def _repeats(estimate: float) -> int:
    return min(MAX_REPEATS, max(1, round(AT_LEAST / max(estimate, 1e-9))))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call: by CUDA events on a GPU, by the wall clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats
