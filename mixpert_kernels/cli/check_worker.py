"""How far each backend is from float64: the arithmetic of ``mixpert check``.

``python -m mixpert_kernels.cli.check_worker PLACE DTYPES OPS``, lists separated by commas, prints the rows of one place
as JSON. A process has one place: a Triton kernel is interpreted or compiled from its definition on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

import mixpert_kernels
from mixpert_kernels import ops
from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.testing import error_and_bound

from .cases import CASES, Case, backward, draw, forward

EMULATED = {"sm_80": "triton", "sm_90": "triton", "csrc sm_80": "cuda", "csrc sm_90": "cuda"}
PLACES = ("cuda", "cpu", "interpreter", *EMULATED)
EMULATOR = Path(mixpert_kernels.__file__).parent.parent / "tests" / "compiled" / "_emulate.py"


@dataclasses.dataclass
class Row:
    """One line of the table; ``error`` and ``allowed`` are of the quantity nearest to its bound."""

    op: str
    direction: str
    backend: str
    dtype: str
    where: str
    status: str = "ok"
    quantity: str = ""
    error: float | None = None
    allowed: float | None = None
    reason: str = ""


def names_of_ops() -> list[str]:
    """The ops there are, whether they have a case or not."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return [name for name in names if not name.startswith("_")]


def rows_of(place: str, dtypes: Sequence[str], names: Sequence[str]) -> list[Row]:
    """Check ops by every backend that a place is for.

    Args:
        place: one of ``PLACES``; the interpreter is for Triton, the CPU for what is not.
        dtypes: names, such as ``bfloat16``.
        names: of the ops.
    """
    device = torch.device("cuda" if place == "cuda" else "cpu")
    where, backends, around = place, ["triton"], contextlib.nullcontext
    if place == "cuda":
        where, backends = torch.cuda.get_device_name(), [b for b in BACKENDS if b != "cpu"]
    elif place == "cpu":
        where, backends = "CPU", [b for b in BACKENDS if b != "triton"]
    elif place in EMULATED:
        backends, chip = [EMULATED[place]], place.split()[-1]
        where, around = f"emulator {chip}", _emulated(chip, *backends)
    elif place != "interpreter":
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place}")
    rows = []
    for op in names:
        for backend in backends:
            for dtype in dtypes:
                rows += _check(Row(op, "both", backend, dtype, where), device, around)
    return rows


def _emulated(chip: str, backend: str) -> Callable[[], contextlib.AbstractContextManager]:
    """What makes a backend's kernels run in the emulator, on tensors of the CPU."""
    sys.path.insert(0, str(EMULATOR.parent.parent))
    names = {"triton": "compiled._emulate", "cuda": "compiled._emulate_cuda"}
    emulator = importlib.import_module(names[backend])
    folder = importlib.import_module(f"mixpert_kernels.backends.{backend}")

    def served(op, device, dtype):
        return None if dtype in folder.DTYPES else f"has no {dtype}"

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with (
            mock.patch.object(folder, "why_not", served),
            emulator.emulated(arch=int(chip.removeprefix("sm_"))),
        ):
            yield

    return around


def _check(row: Row, device: torch.device, around: Callable) -> list[Row]:
    """The rows of one op, backend and dtype: forward and backward, or why neither."""
    case, dtype = CASES.get(row.op), getattr(torch, row.dtype)
    if case is None:
        return [dataclasses.replace(row, status="FAILED", reason="no case checks this op")]
    with around():
        reason = why_not(row.op, row.backend, device=device, dtype=dtype)
    if reason is not None:
        return [dataclasses.replace(row, status="not run", reason=reason)]
    directions = ["forward", "backward"] if case.differentiable else ["forward"]
    rows = [dataclasses.replace(row, direction=direction) for direction in directions]
    for one in rows:
        try:
            _measure(one, case, device, dtype, around)
        except Exception as error:  # a kernel may fail in any way; the other rows still count
            text = " ".join(str(error).split())
            one.status, one.reason = "FAILED", f"{type(error).__name__}: {text}"[:300]
    return rows


def _measure(row: Row, case: Case, device: torch.device, dtype: torch.dtype, around: Callable):
    tensors = {name: t.to(device, dtype) for name, t in draw(case.shapes).items()}
    evaluate = forward if row.direction == "forward" else backward
    with around():
        got = evaluate(case, tensors, row.backend)
    plain = evaluate(case, tensors, "reference")
    truth = evaluate(case, {name: t.double() for name, t in tensors.items()}, "reference")
    worst = -1.0
    for name, tensor in got.items():
        if tensor.is_floating_point():
            error, allowed = error_and_bound(tensor, plain[name], truth[name])
        else:
            error, allowed = float((tensor != truth[name]).sum()), 0.0
        share = error / allowed if allowed else error * math.inf if error else 0.0
        if not share <= worst:  # NaN too
            worst, row.quantity, row.error, row.allowed = share, name, error, allowed
        if not share <= 1:
            row.status = "FAILED"
            if not math.isfinite(error):
                row.error, row.reason = None, f"{name} is not finite"
            return


def main(argv: list[str]) -> None:
    """Print the rows as JSON, on one line."""
    torch.set_num_threads(1)
    place, dtypes, names = argv
    rows = rows_of(place, dtypes.split(","), names.split(","))
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1:])
