"""Measure which backend is the fastest at each of a model's calls, on the device at hand."""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from mixpert_kernels import Routing, backends
from mixpert_kernels.backends import choice

from .calls import Call, Tensors
from .checking import why_wrong
from .timing import time_interleaved

LOOP = "loop"  # the baseline: no backend, and never chosen
DIRECTIONS = ("forward", "training")
EVEN = 0.02  # backends this close are even, and the first in order is taken


@dataclass
class Timing:
    """One call at one batch: the rounds' seconds by backend, and why others have none."""

    call: Call
    batch: int
    direction: str  # training: forward and backward
    rounds: dict[str, list[float]] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.call.op, self.call.widths

    @property
    def seconds(self) -> dict[str, float]:
        return {name: statistics.median(found) for name, found in self.rounds.items()}

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        own = {"batch": self.batch, "direction": self.direction, "seconds": self.seconds}
        return self.call._asdict() | own | {"excluded": self.excluded}


@dataclass
class Report:
    """What ``tune`` found out."""

    device: torch.device
    dtype: torch.dtype
    timings: list[Timing]
    rows: list[choice.Measured]
    seconds: float


def tune(
    calls: Sequence[Call],
    *,
    tokens: int,
    experts: int = 4,
    device: torch.device | str,
    dtype: torch.dtype,
    batches: Sequence[int] = (1, 8, 32),
    seconds: float = 60.0,
    train: bool = False,
    captured: bool = False,
    progress: bool = True,
) -> Report:
    """Time every call by every backend that can run it, and by a plain loop over the experts; store nothing.

    A backend's result is compared with the reference first: one that is wrong is not timed and not chosen. One backend
    is chosen for all batches, by the geometric mean of its times: a choice must not depend on the batch.

    Args:
        calls: the ops and widths of a model, as of ``hf.widths``.
        tokens: T of a tile.
        experts: E; tile b goes to expert b mod E.
        device: where to run.
        dtype: of features and parameters.
        batches: numbers of tiles, each at least 1.
        seconds: about how long; compilation comes on top, and slow calls run three rounds however long they take.
        train: time forward and backward as well, at equal weight.
        captured: time CUDA graphs, as ``tower.capture`` runs them: the host's part of each call is saved.
        progress: show a bar in a terminal.

    Raises:
        ValueError: a batch is below 1, there is nothing to time, or ``captured`` on a CPU or with ``train``.
        RuntimeError: there is no such device, or the reference itself fails.

    Example:
        >>> calls = [Call("grouped_layer_norm", (16,))]
        >>> report = tune(calls, tokens=4, device="cpu", dtype=torch.float32, batches=[2], seconds=0, progress=False)
        >>> report.rows[0].op, report.rows[0].widths
        ('grouped_layer_norm', (16,))
    """
    device = torch.device(device)
    choice.device_name(device)
    sizes = sorted(set(batches))
    if not calls or not sizes or sizes[0] < 1:
        raise ValueError(
            f"tune: batches must be numbers of at least 1, got {list(batches)}"
            if calls
            else "tune: calls must hold at least one call"
        )
    if captured and (train or device.type != "cuda"):
        raise ValueError("tune: captured must be False on a CPU and in training, got True")
    start = time.perf_counter()
    timings = [
        Timing(call, batch, direction)
        for call in dict.fromkeys(calls)
        for batch in sizes
        for direction in DIRECTIONS[: 1 + (train and call.differentiable)]
    ]
    bar = tqdm(timings, desc="tuning", leave=False, delay=1, disable=None if progress else True)
    for done, timing in enumerate(bar):
        bar.set_postfix_str(f"{timing.call.op} {timing.call.widths}, {timing.batch} tiles")
        left = seconds - (time.perf_counter() - start)
        share = left / (len(timings) - done)
        _measure(timing, tokens, experts, device, dtype, share, captured)
    rows = [dataclasses.replace(row, captured=captured) for row in choose(timings, dtype, train)]
    return Report(device, dtype, timings, rows, time.perf_counter() - start)


def _measure(
    timing: Timing,
    tokens: int,
    experts: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    captured: bool,
) -> None:
    call = timing.call
    chosen = torch.arange(timing.batch, device=device) % experts
    routing = Routing.forced(chosen, experts)
    tiles_of = [(chosen == e).nonzero().flatten() for e in range(experts)]
    runs: dict[str, Callable[[Tensors], Tensors]] = {}
    try:
        t = call.draw(call.shapes(timing.batch, tokens, experts), device, dtype)
        for name in backends.BACKENDS:
            reason = why_not(call.op, name, device, dtype)
            if reason is None:
                reason = why_wrong(call, name, t, routing, timing.direction == "training")
            if reason is None:
                runs[name] = lambda t, name=name: call.run(t, routing, name)
            else:
                timing.excluded[name] = reason
        runs[LOOP] = lambda t: call.loop(t, tiles_of)
        with torch.set_grad_enabled(timing.direction == "training"):
            ready = {n: _ready(run, t, timing.direction) for n, run in runs.items()}
            for one in ready.values():
                one()
            if captured:
                ready = _captured(ready, device, timing.excluded)
            timing.rounds = time_interleaved(ready, device, seconds)
    except torch.OutOfMemoryError:
        timing.rounds = {}
        timing.excluded |= {name: f"no memory for {timing.batch} tiles" for name in (*runs, LOOP)}


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``auto`` would never take a backend."""
    if backend == "triton" and device.type == "cpu":
        return "is interpreted on a CPU"
    return backends.why_not(op, backend, device=device, dtype=dtype)


def _ready(run: Callable[[Tensors], Tensors], t: Tensors, direction: str) -> Callable[[], object]:
    """What is timed: the call, or the call and its backward."""
    if direction == "forward":
        return lambda: run(t)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    y = next(iter(run(leaves).values()))
    dy = torch.randn_like(y)
    del y

    def step() -> object:
        y = next(iter(run(leaves).values()))
        return torch.autograd.grad(y, list(leaves.values()), dy)

    return step


def _captured(
    ready: dict[str, Callable[[], object]], device: torch.device, excluded: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """The calls as CUDA graphs; one that cannot be captured, as a loop that waits for its routes, is excluded."""
    from mixpert_kernels.hf.cuda_graph import CudaRecorder

    recorder = CudaRecorder(device)
    replays = {}
    for name, call in ready.items():
        try:
            _, replays[name] = recorder.record(call)
        except RuntimeError as error:
            excluded[name] = f"cannot be captured: {' '.join(str(error).split())}"[:300]
    return replays


def choose(
    timings: Sequence[Timing], dtype: torch.dtype, train: bool = False
) -> list[choice.Measured]:
    """One backend a shape class, the fastest over all its timings by the geometric mean of ratios."""
    rows = []
    today = datetime.date.today().isoformat()
    for key in dict.fromkeys(timing.key for timing in timings):
        same = [timing for timing in timings if timing.key == key and timing.rounds]
        everywhere = [n for n in backends.BACKENDS if same and all(n in t.rounds for t in same)]
        if not everywhere:
            continue
        timed = [n for n in (*everywhere, LOOP) if all(n in t.rounds for t in same)]
        typical = {n: _mean([t.seconds[n] for t in same]) for n in timed}
        even = (1 + EVEN) * min(typical[name] for name in everywhere)
        best = next(name for name in everywhere if typical[name] <= even)
        others = sorted(set(timed) - {best}, key=lambda name: typical[name])
        row = choice.Measured(
            op=key[0],
            dtype=str(dtype).removeprefix("torch."),
            widths=key[1],
            backend=best,
            date=today,
            ratios={name: round(typical[best] / typical[name], 4) for name in others},
            batches=tuple(sorted({timing.batch for timing in same})),
            training=train and same[0].call.differentiable,
        )
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(value, 1e-12)) for value in values))


def as_json(report: Report, facts: dict[str, Any]) -> dict[str, Any]:
    """A report as JSON can hold it."""
    return {
        "identity": facts,
        "dtype": str(report.dtype).removeprefix("torch."),
        "seconds": round(report.seconds, 1),
        "timings": [timing.as_json() for timing in report.timings],
        "rows": [dataclasses.asdict(row) for row in report.rows],
    }
