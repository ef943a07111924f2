"""mixpert tune: what is timed, that it is right, what is chosen, stored and shown."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mixpert_kernels import Routing, cli
from mixpert_kernels.backends import choice, pick, why_not
from mixpert_kernels.backends.cpu import grouped_layer_norm as cpu_norm
from mixpert_kernels.backends.cpu import grouped_linear as cpu_linear
from mixpert_kernels.tuning import Call, Timing, checking, run, timing, tune
from mixpert_kernels.tuning.checking import why_wrong

CPU = torch.device("cpu")
SMALL = ["--hidden", "24", "--intermediate", "40", "--projected", "16", "--tokens", "5"]
SMALL += ["--batches", "1", "3", "--seconds", "0"]
LINEAR = Call("grouped_linear", (24, 40), (), "gelu", False)
CALLS = [
    Call("route", (24, 4)),
    Call("route", (24, 16, 4)),
    Call("grouped_layer_norm", (24,)),
    Call("grouped_linear", (24, 30), (10, 20), "quick_gelu"),
    Call("grouped_linear", (24, 24), (24,), "relu", True),
    Call("grouped_mlp", (24, 40, 24), (), "gelu_tanh", True),
    Call("norm_grouped_linear", (24, 30), (10, 20)),
    Call("route_grouped_linear", (24, 30), (10, 20)),
]
pytestmark = pytest.mark.skipif(
    why_not("grouped_linear", "cpu", device=CPU, dtype=torch.float32) is not None,
    reason="this PyTorch was built without oneDNN: there is one backend, and nothing to choose",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXPERT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MIXPERT_BACKEND_TABLE")
    choice.forget()
    yield tmp_path / "cache"
    choice.forget()


@pytest.fixture
def clock(monkeypatch):
    """Times that are no times: those of each name, for every call."""
    times = {"cpu": 2e-3, "reference": 1e-3, "loop": 5e-4}

    def rounds(calls, device, seconds):
        return {name: [times[name]] * 3 for name in calls}

    monkeypatch.setattr(run, "time_interleaved", rounds)
    return times


def measure(*calls: Call, batches=(3,), **options):
    given = {"tokens": 5, "device": "cpu", "dtype": torch.float32, "seconds": 0.0}
    return tune(calls, batches=batches, progress=False, **(given | options))


def cli_run(capsys, *argv: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.main(list(argv)) == status
    return capsys.readouterr()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op}{call.widths}")
@pytest.mark.parametrize("experts", [(1, 0, 1, 3, 2), (2,)], ids=len)
def test_the_loop_computes_what_the_op_does(call, experts):
    t = call.draw(call.shapes(len(experts), 7, 4), CPU, torch.float32)
    chosen = torch.tensor(experts)
    tiles_of = [(chosen == e).nonzero().flatten() for e in range(4)]
    wanted = call.run(t, Routing.forced(chosen, 4), "reference")
    got = call.loop(t, tiles_of)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_every_call_is_timed_by_every_backend_and_the_loop(train):
    report = measure(*CALLS, batches=(3, 1, 3), train=train)
    directions = ("forward", "training") if train else ("forward",)
    wanted = [
        (call, batch, direction)
        for call in CALLS
        for batch, direction in itertools.product((1, 3), directions)
        if direction == "forward" or call.op not in ("norm_grouped_linear", "route_grouped_linear")
    ]
    assert [(t.call, t.batch, t.direction) for t in report.timings] == wanted
    for found in report.timings:
        cpu = set() if found.call.op == "route" else {"cpu"}
        assert set(found.rounds) == {"reference", "loop"} | cpu
        assert all(len(rounds) >= timing.MIN_ROUNDS for rounds in found.rounds.values())
        assert all(second > 0 for rounds in found.rounds.values() for second in rounds)
        assert set(found.excluded) >= {"triton", "cuda"}
    assert [(row.op, row.widths) for row in report.rows] == [(c.op, c.widths) for c in CALLS]
    for row in report.rows:
        assert row.backend in ("cpu", "reference") and row.batches == (1, 3)
        assert row.training == (train and Call(row.op, ()).differentiable)
        assert row.backend not in row.ratios and "loop" in row.ratios


def broken(how: str):
    """The CPU backend's grouped_linear with one fault."""
    right = cpu_linear.grouped_linear

    def wrong(x, weights, *rest):
        y, pre = right(x, weights, *rest)
        if how == "raises":
            raise RuntimeError("illegal\n instruction")
        if how == "off":
            y = y * 1.001
        elif how == "NaN":
            y[-1, -1, -1] = torch.nan
        elif how == "one number of a tile in between":
            y[1, 2, 3] += 0.5
        elif how == "another expert":
            y = right(x, [w.flip(0) for w in weights], *rest)[0]
        return y, pre

    return wrong


@pytest.mark.parametrize(
    "how, says",
    [
        ("raises", "fails: RuntimeError: illegal instruction"),
        ("off", "wrong: y is off by"),
        ("NaN", "wrong: y is off by nan"),
        ("one number of a tile in between", "wrong: y is 5.0e-01 from the reference's"),
        ("another expert", "wrong: y is off by"),
    ],
)
def test_a_wrong_backend_is_named_not_timed_and_not_chosen(how, says, monkeypatch, capsys, clock):
    clock["cpu"] = 1e-9
    monkeypatch.setattr(cpu_linear, "grouped_linear", broken(how))
    report = measure(LINEAR)
    assert report.timings[0].excluded["cpu"].startswith(says)
    assert set(report.timings[0].rounds) == {"reference", "loop"}
    assert [row.backend for row in report.rows] == ["reference"]
    out, _ = cli_run(capsys, "tune", *SMALL)
    assert "not timed, and not chosen" in out and says in out
    place = {"device": CPU, "dtype": torch.float32, "widths": (24, 24)}
    assert ".reference." in pick("grouped_linear", "auto", **place).__name__


def test_a_backend_with_a_wrong_gradient_is_not_timed_in_training(monkeypatch, clock):
    right = cpu_norm.grouped_layer_norm_backward

    def wrong(*args):
        dx, dweight, dbias = right(*args)
        return dx, dweight * 1.01, dbias

    monkeypatch.setattr(cpu_norm, "grouped_layer_norm_backward", wrong)
    clock["cpu"] = 1e-9
    norm = Call("grouped_layer_norm", (24,))
    assert measure(norm).rows[0].backend == "cpu"
    report = measure(norm, train=True)
    forward, training = report.timings
    assert "cpu" in forward.rounds and training.excluded["cpu"].startswith("wrong: dnorm.weight")
    assert report.rows[0].backend == "reference"


def test_a_wrong_route_is_found(monkeypatch):
    """Not the router's numbers alone: an expert's id has to be the reference's."""
    call, right = Call("route", (24, 4)), Call.run
    t = call.draw(call.shapes(3, 5, 4), CPU, torch.float32)

    def wrong(self, t, routing, backend):
        got = right(self, t, routing, "reference")
        return got | {"expert": got["expert"].flip(0)} if backend == "cpu" else got

    monkeypatch.setattr(Call, "run", wrong)
    routing = Routing.forced(torch.tensor([0, 1, 2]), 4)
    assert why_wrong(call, "cpu", t, routing) == "wrong: expert differs from the reference's"


def test_a_few_roundings_more_are_not_wrong():
    truth = {"y": torch.zeros(3, 2, dtype=torch.float64)}
    plain = {"y": torch.full((3, 2), 1e-3)}
    for times, wrong in ((3, False), (5, True)):
        got = {"y": times * plain["y"]}
        assert bool(checking._compare(got, plain, truth, [0, 1, 2])) is wrong
        assert bool(checking._compare(got, plain, truth, None)) is wrong


def timings(call: Call, **seconds: list[float]) -> list[Timing]:
    """One batch an entry; None: excluded there."""
    return [
        Timing(call, batch, "forward", {n: [s[i]] * 3 for n, s in seconds.items() if s[i]})
        for i, batch in enumerate((1, 8, 32))
    ]


def chosen(**seconds: list[float]):
    (row,) = run.choose(timings(LINEAR, **seconds), torch.bfloat16)
    return row


def test_one_backend_for_all_batches_by_the_geometric_mean():
    row = chosen(triton=[4, 8, 20], cuda=[1, 8, 24], reference=[50, 50, 50], loop=[0.1, 0.1, 0.1])
    assert (row.op, row.dtype, row.widths, row.backend) == (
        *("grouped_linear", "bfloat16", (24, 40), "cuda"),
    )
    assert row.ratios["triton"] == pytest.approx((1 / 4 * 24 / 20) ** (1 / 3), abs=1e-4)
    assert list(row.ratios) == ["loop", "triton", "reference"] and row.batches == (1, 8, 32)
    assert chosen(triton=[4, 8, 20], cuda=[3.99, 8, 100], loop=[9, 9, 9]).backend == "triton"


def test_even_backends_keep_their_order():
    assert chosen(triton=[1, 1, 1.02], cuda=[1, 1, 1], loop=[9, 9, 9]).backend == "triton"
    assert chosen(triton=[1.1, 1.1, 1], cuda=[1, 1, 1], loop=[9, 9, 9]).backend == "cuda"


def test_a_backend_excluded_at_one_batch_is_not_chosen():
    row = chosen(triton=[9, 9, 9], cuda=[1, None, 1], loop=[5, 5, 5])
    assert row.backend == "triton" and "cuda" not in row.ratios
    assert run.choose([Timing(LINEAR, 1, "forward", {}, {"cpu": "wrong: y"})], torch.float32) == []


def test_two_layers_of_one_class_share_a_choice():
    other = LINEAR._replace(activation="none")
    both = timings(LINEAR, triton=[1, 1, 1], cuda=[2, 2, 2], loop=[9, 9, 9])
    both += timings(other, triton=[9, 9, 9], cuda=[2, 2, 2], loop=[9, 9, 9])
    assert [row.backend for row in run.choose(both, torch.float32)] == ["cuda"]


def test_rounds_are_interleaved_and_the_hopeless_leave():
    order = []

    def call(name, seconds):
        return lambda: (order.append(name), clock.advance(seconds))

    class Clock:
        now = 0.0

        def advance(self, seconds):
            self.now += seconds

    clock = Clock()
    calls = {"a": call("a", 1.0), "b": call("b", 2.0), "slow": call("slow", 9.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: clock.now)
        found = timing.time_interleaved(calls, CPU, seconds=60.0)
        assert found == {"a": [1.0] * 12, "b": [2.0] * 12, "slow": [9.0] * 3}
        patterns = {tuple(order[i : i + 3]) for i in range(3, 12, 3)}
        assert {frozenset(p) for p in patterns} == {frozenset(calls)} and len(patterns) > 1
        assert len(timing.time_interleaved(calls, CPU, seconds=0.0)["a"]) == timing.MIN_ROUNDS
        short = {"short": call("short", 1e-4)}
        order.clear()
        assert timing.time_interleaved(short, CPU, 0.0)["short"] == pytest.approx([1e-4] * 3)
        assert len(order) == 1 + 3 * 20  # so often that the clock is read every 2 ms


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Begin and end are noted on the device, around calls that follow each other."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    seconds = timing.seconds_of(lambda: log.append("call"), torch.device("cuda"), 3)
    assert seconds == pytest.approx(2e-3)
    assert log == ["wait", "record", *["call"] * 3, "record", "wait"]


def test_captured_calls_are_timed_by_their_replay(monkeypatch):
    """And what waits for its routes is left out, as a capture refuses it."""
    recorded = []

    class Recorder:
        def __init__(self, device):
            assert device == CPU

        def record(self, call):
            recorded.append(call)
            if len(recorded) == 3:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            return None, lambda: None

    monkeypatch.setattr("mixpert_kernels.hf.cuda_graph.CudaRecorder", Recorder)
    ready, excluded = {name: lambda: None for name in ("triton", "reference", "loop")}, {}
    assert set(run._captured(ready, CPU, excluded)) == {"triton", "reference"}
    assert recorded == list(ready.values())
    assert excluded == {
        "loop": "cannot be captured: operation not permitted when stream is capturing"
    }
    with pytest.raises(ValueError, match="captured must be False on a CPU"):
        measure(LINEAR, captured=True)
    row = choice.Measured("route", "float32", (4,), "cuda", "2026-01-31", captured=True)
    assert row.reason.startswith("measured here on 2026-01-31 in CUDA graphs: ")


def test_tune_stores_auto_follows_and_info_shows(capsys, cache, clock):
    place = {"device": CPU, "dtype": torch.float32}
    assert ".cpu." in pick("grouped_linear", "auto", **place, widths=(24, 24)).__name__
    out, _ = cli_run(capsys, "tune", *SMALL)
    (path,) = cache.iterdir()
    assert str(path) in out
    for op, sizes in (("norm_grouped_linear", "24x72"), ("grouped_mlp", "24x16x16")):
        assert any(line.split()[:3] == [op, sizes, "reference"] for line in out.splitlines())
    assert "cpu 0.50" in out and "loop 2.00" in out
    assert ".reference." in pick("grouped_linear", "auto", **place, widths=(24, 24)).__name__
    assert ".cpu." in pick("grouped_linear", "auto", **place, widths=(24, 25)).__name__
    text, _ = cli_run(capsys, "info")
    assert "measured here on" in text and "0.50 of cpu" in text and str(path) in text
    facts = json.loads(cli_run(capsys, "info", "--json")[0])
    (one,) = facts["ops"]["grouped_mlp"]["float32"]["measured"][:1]
    assert one["takes"] == "reference" and one["because"].startswith("measured here on")
    assert facts["ops"]["grouped_mlp"]["float32"]["takes"] == "cpu"
    assert facts["ops"]["grouped_mlp"]["bfloat16"]["measured"] == []
    choice.store(CPU, [choice.Measured("route", "float32", (24, 4), "cuda", "2026-01-31")])
    facts = json.loads(cli_run(capsys, "info", "--json")[0])
    (one,) = facts["ops"]["route"]["float32"]["measured"]
    assert one["takes"] == "reference" and one["because"].startswith("the next after cuda, which")


def test_info_says_where_a_damaged_file_is(capsys, cache, clock):
    cli_run(capsys, "tune", *SMALL)
    (path,) = cache.iterdir()
    path.write_text("{")
    choice.forget()
    text, _ = cli_run(capsys, "info")
    assert f"{path} is ignored: it is damaged" in text and "measured here" not in text


def test_dry_run_writes_nothing(capsys, cache, clock):
    out, _ = cli_run(capsys, "tune", *SMALL, "--dry-run")
    assert "nothing was stored" in out and not cache.exists()
    report = json.loads(cli_run(capsys, "tune", *SMALL, "--dry-run", "--json")[0])
    assert not cache.exists()
    assert set(report) == {"identity", "dtype", "seconds", "timings", "rows"}
    assert report["rows"][0]["backend"] == "reference" and report["dtype"] == "float32"
    assert report["timings"][0]["seconds"] == clock


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_cache_that_cannot_be_written_is_one_line_after_the_result(
    capsys, tmp_path, monkeypatch, clock, form
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXPERT_CACHE_DIR", str(tmp_path / "file"))
    out, err = cli_run(capsys, "tune", *SMALL, *form, status=1)
    assert "norm_grouped_linear" in out
    assert err.count("\n") == 1 and err.startswith("mixpert tune: the measurements cannot be wr")
    assert str(tmp_path / "file") in err and "MIXPERT_CACHE_DIR" in err


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--batches", "0"], "batches must be numbers of at least 1"),
        (["--hidden", "0"], "hidden must be at least 1"),
        (["--experts", "0"], "experts must be at least 1"),
        (["/nowhere"], "directory must exist"),
        ([".", "--geometry", "base"], "MODEL_DIR must come without"),
        (["--device", "tpu9"], "--device must name a device"),
        (["--device", "cuda:77"], "no device cuda:77 here"),
        (["--device", "meta"], "--device must be a CPU or a GPU"),
    ],
)
def test_wrong_arguments(capsys, argv, says, cache):
    _, err = cli_run(capsys, "tune", *argv, status=1)
    assert says in err and err.count("\n") == 1 and not cache.exists()


def test_an_op_that_finds_no_memory_is_left_out(monkeypatch):
    def full(calls, device, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "time_interleaved", full)
    report = measure(LINEAR)
    assert report.rows == [] and report.timings[0].excluded["cpu"] == "no memory for 3 tiles"
