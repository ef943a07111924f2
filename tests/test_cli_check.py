"""``mixpert check``: what it runs, what it prints, and that it does not overlook a broken kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from mixpert_kernels import backends, cli
from mixpert_kernels.backends import why_not
from mixpert_kernels.cli import cases, check, check_worker

KEYS = {"op", "pass", "backend", "dtype", "where", "status", "quantity", "error", "allowed"}
KEYS |= {"reason"}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_interpreter = pytest.mark.skipif(
    why_not("grouped_layer_norm", "triton", device="cpu", dtype=torch.float32) is not None,
    reason="Triton is not interpreted here",
)


@pytest.fixture
def here(monkeypatch):
    """Run the jobs of the CPU in this process, and no other."""

    def rows(job):
        if job.place != "cpu":
            return []
        found = check_worker.rows_of(*job)
        return [check._named(dataclasses.asdict(row)) for row in found]

    monkeypatch.setattr(check, "_rows", rows)


def test_every_op_has_a_case():
    assert set(cases.CASES) == set(check_worker.names_of_ops())


def test_the_routes_of_the_cases_are_no_matter_of_rounding():
    """In no dtype may another expert win, or its row would fail on a sound machine."""
    for name in ("route", "route_grouped_linear"):
        drawn = cases.draw(cases.CASES[name].shapes)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rounded = {key: t.to(dtype).double() for key, t in drawn.items()}
            best = cases.forward(cases.CASES[name], rounded, "reference")["scores"].topk(2).values
            assert (best[:, 0] - best[:, 1] > 0.01).all()


def test_a_source_checkout_has_the_emulator():
    assert (
        check_worker.EMULATOR.is_file()
        or not (check_worker.EMULATOR.parents[2] / "setup.py").exists()
    )


def test_it_checks_every_backend_in_every_dtype(capsys):
    """The whole command, processes and all, for the op that is cheapest."""
    status = cli.main(["check", "--op", "grouped_layer_norm", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["failed"] == 0, report
    assert {"versions", "machine", "seconds", "failed", "rows"} == set(report)
    rows = report["rows"]
    assert all(set(row) == KEYS for row in rows)
    assert {row["backend"] for row in rows} == set(backends.BACKENDS)
    ran = {(row["where"], row["dtype"], row["pass"]) for row in rows if row["status"] == "ok"}
    for dtype in ("float32", "float16", "bfloat16"):
        assert {("CPU", dtype, "forward"), ("CPU", dtype, "backward")} <= ran
    if HAS_TRITON and not torch.cuda.is_available():
        assert {
            ("interpreter", "float16", "backward"),
            ("interpreter", "float32", "forward"),
        } <= ran
        assert any("bfloat16 products are wrong" in row["reason"] for row in rows)
        if check_worker.EMULATOR.is_file():
            for chip in ("sm_80", "sm_90"):
                assert (f"emulator {chip}", "bfloat16", "backward") in ran


def test_the_table_can_be_pasted(here, capsys):
    assert cli.main(["check", "--op", "route", "--op", "grouped_linear"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "python" and any(line.startswith("cpu") for line in lines)
    head = next(i for i, line in enumerate(lines) if line.startswith("op "))
    assert lines[head].split() == list(check.HEAD)
    assert any(line.startswith("route ") and "not run: has no route" in line for line in lines)
    assert any(
        line.startswith("grouped_linear  backward") and line.endswith(" ok") for line in lines
    )
    assert any(line.startswith("18 ok, 0 FAILED, ") for line in lines)


@pytest.mark.parametrize("name", ["grouped_layer_norm", "grouped_layer_norm_backward"])
def test_a_backend_that_is_slightly_off_makes_it_fail(name, here, capsys, monkeypatch):
    from mixpert_kernels.backends.cpu import grouped_layer_norm as module

    sound = getattr(module, name)

    def off(*args):
        first, *rest = sound(*args)
        return first + 1e-4, *rest

    monkeypatch.setattr(module, name, off)
    assert cli.main(["check", "--op", "grouped_layer_norm", "--json"]) == 1
    output = capsys.readouterr()
    failed = [row for row in json.loads(output.out)["rows"] if row["status"] == "FAILED"]
    direction, quantity = ("backward", "dx") if name.endswith("backward") else ("forward", "y")
    assert {row["backend"] for row in failed} == {"cpu"}
    assert {row["pass"] for row in failed} == {direction}
    assert all(row["quantity"] == quantity and row["error"] > row["allowed"] for row in failed)
    assert output.err.startswith("mixpert check: ") and "checks failed" in output.err


@pytest.mark.parametrize(
    "result, reason",
    [
        (lambda y, *rest: (torch.full_like(y, float("nan")), *rest), "y is not finite"),
        (lambda y, *rest: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["nan", "error"],
)
@needs_interpreter
def test_a_kernel_that_breaks_is_a_failed_row_with_a_reason(result, reason, monkeypatch):
    from mixpert_kernels.backends.triton import grouped_layer_norm as module

    sound = module.grouped_layer_norm
    monkeypatch.setattr(module, "grouped_layer_norm", lambda *args: result(*sound(*args)))
    rows = check_worker.rows_of("interpreter", ["float32"], ["grouped_layer_norm"])
    assert rows[0].direction == "forward" and rows[0].status == "FAILED"
    assert rows[0].reason == reason
    json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)


def test_a_wrong_expert_is_a_failed_row(monkeypatch):
    from mixpert_kernels.backends.reference import route as module

    sound = module.route

    def swapped(x, *args):
        scores, pooled, expert, *rest = sound(x, *args)
        return scores, pooled, expert if x.dtype == torch.float64 else 3 - expert, *rest

    monkeypatch.setattr(module, "route", swapped)
    rows = check_worker.rows_of("cpu", ["float32"], ["route"])
    (row,) = (row for row in rows if row.direction == "forward")
    assert row.status == "FAILED" and row.quantity == "expert" and row.error == cases.TILES


def test_a_process_that_crashes_or_hangs_is_a_failed_row(monkeypatch):
    (row,) = check._rows(check.Job("nowhere", ("float32",), ("route",)))
    assert row["status"] == "FAILED" and "ended with status 1" in row["reason"]
    assert "place must be one of cuda, cpu" in row["reason"]
    monkeypatch.setattr(check, "TIMEOUT", 0.1)
    (row,) = check._rows(check.Job("cpu", ("float32",), ("route",)))
    assert row["status"] == "FAILED" and row["reason"] == "did not end within 0.1 s"


def reasons(rows):
    assert all(row["status"] == "not run" for row in rows)
    return {row["backend"]: row["reason"] for row in rows}


def test_what_is_not_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = "a source checkout has the emulator, an installed package does not"
    if HAS_TRITON and check_worker.EMULATOR.is_file():
        monkeypatch.setattr(check.shutil, "which", lambda name: "/bin/nvcc")
        assert reasons(check.plan(None, False)[1]) == {
            "cuda": "--full compiles and runs it: minutes"
        }
        jobs, rows = check.plan(None, True)
        assert not rows and [job.place for job in jobs].count("csrc sm_90") == 3
        monkeypatch.setattr(check.shutil, "which", lambda name: None)
        assert reasons(check.plan(None, True)[1]) == {"cuda": "nvcc is not on PATH"}
    monkeypatch.setattr(check_worker, "EMULATOR", tmp_path / "missing.py")
    if HAS_TRITON:
        jobs, rows = check.plan(None, True)
        assert [job.place for job in jobs] == ["interpreter", "cpu"]
        assert reasons(rows) == {"triton": absent, "cuda": absent}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jobs, rows = check.plan(None, False)
    assert [job.place for job in jobs] == ["cpu"]
    assert reasons(rows) == {"triton": "triton is not installed", "cuda": absent}


def test_an_unknown_op_is_one_line(capsys):
    assert cli.main(["check", "--op", "softmax"]) == 1
    assert "op must be one of adaptive_pool, " in capsys.readouterr().err
