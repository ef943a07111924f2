"""mixpert tune on a GPU: every backend is right and timed, and auto follows the winner without waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS, choice, pick, why_not
from mixpert_kernels.ops import grouped_linear
from mixpert_kernels.tuning import Call, tune

pytestmark = pytest.mark.gpu
DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
CALLS = [
    Call("route", (136, 4)),
    Call("grouped_layer_norm", (136,)),
    Call("grouped_linear", (136, 208), (208,), "gelu", True),
    Call("grouped_mlp", (136, 208, 136), (), "gelu_tanh", True),
    Call("norm_grouped_linear", (136, 408), (136,) * 3),
    Call("route_grouped_linear", (136, 408), (136,) * 3),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXPERT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MIXPERT_BACKEND_TABLE", raising=False)
    choice.forget()
    yield
    choice.forget()


@pytest.mark.parametrize("options", [{}, {"train": True}, {"captured": True}], ids=str)
def test_every_backend_that_runs_here_is_right_and_timed(options):
    given = {"tokens": 145, "device": DEVICE, "dtype": DTYPE, "batches": (1, 5), "seconds": 2.0}
    report = tune(CALLS, **given, **options, progress=False)
    for timing in report.timings:
        runs = {
            name
            for name in BACKENDS
            if why_not(timing.call.op, name, device=DEVICE, dtype=DTYPE) is None
        }
        if options.get("captured"):  # what a capture refuses is no fault
            runs -= {n for n, why in timing.excluded.items() if why.startswith("cannot be captur")}
        assert runs <= set(timing.rounds), timing.excluded
    assert len(report.rows) == len(CALLS)


def test_auto_follows_without_waiting():
    row = choice.Measured("grouped_linear", "bfloat16", (136, 208), "reference", "2026-01-31")
    choice.store(DEVICE, [row])
    place = {"device": DEVICE, "dtype": DTYPE}
    assert ".reference." in pick("grouped_linear", "auto", **place, widths=(136, 208)).__name__
    assert ".reference." not in pick("grouped_linear", "auto", **place, widths=(136, 200)).__name__
    choice.store(DEVICE, [choice.Measured(*row.key[:1], "bfloat16", (136, 208), "triton", "d")])
    x = torch.randn(3, 17, 136, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(4, 208, 136, device=DEVICE, dtype=DTYPE)
    routing = Routing.forced(torch.tensor([1, 0, 1], device=DEVICE), 4)
    grouped_linear(x, weight, None, routing)  # compiles, and reads the file
    choice.forget()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_linear(x, weight, None, routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
