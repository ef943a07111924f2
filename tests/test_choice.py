"""Which backend ``auto`` takes: what was measured on the device, else the shipped table, else the order."""

from __future__ import annotations

import json
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixpert_kernels import Routing, backends
from mixpert_kernels._build_info import BuildInfo
from mixpert_kernels.backends import BACKENDS, choice, pick, shipped
from mixpert_kernels.backends.choice import Measured
from mixpert_kernels.ops import grouped_layer_norm, grouped_linear
from mixpert_kernels.tuning import Call

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OP, F32 = "grouped_linear", torch.float32
WIDTHS = (40, 48)
ROUTING = Routing.forced(torch.tensor([1, 0, 1]), 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache directory, which auto follows."""
    monkeypatch.setenv("MIXPERT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MIXPERT_BACKEND_TABLE")
    choice.forget()
    yield tmp_path / "cache"
    choice.forget()


def measured(backend="reference", op=OP, dtype="float32", widths=WIDTHS, **more) -> Measured:
    return Measured(op, dtype, widths, backend, "2026-01-31", **more)


def taken(op=OP, dtype=F32, widths=WIDTHS, device=CPU) -> str:
    return pick(op, "auto", device=device, dtype=dtype, widths=widths).__name__.split(".")[-2]


def test_measured_then_shipped_then_order(cache, monkeypatch):
    assert taken() == "cpu" and choice.reason(OP, CPU, F32, WIDTHS).startswith("shipped row: meas")
    row = measured(ratios={"cpu": 0.834, "loop": 0.5})
    choice.store(CPU, [row])
    assert taken() == "reference"
    wanted = "measured here on 2026-01-31: 0.83 of cpu, 0.50 of loop"
    assert choice.reason(OP, CPU, F32, WIDTHS) == wanted
    only = shipped.Shipped("cpu", "any", "any", "reference", "not measured yet: a test")
    monkeypatch.setattr(shipped, "ROWS", (only,))
    choice.forget()
    assert taken(op="grouped_mlp") == "reference"
    monkeypatch.setattr(shipped, "ROWS", ())
    choice.forget()
    assert taken() == "reference" and taken(op="grouped_mlp") == "cpu"
    assert choice.first("grouped_mlp", CPU, F32) is choice.reason("grouped_mlp", CPU, F32) is None


@pytest.mark.parametrize(
    "other",
    [{"widths": (40, 49)}, {"widths": ()}, {"dtype": torch.bfloat16}, {"op": "grouped_mlp"}],
)
def test_a_measurement_is_of_its_shape_class_alone(cache, other):
    choice.store(CPU, [measured()])
    assert taken() == "reference" and taken(**other) == "cpu"


@pytest.mark.parametrize("backend", ["triton", "cuda", "faster"])
def test_a_backend_that_cannot_run_is_never_taken(cache, backend):
    """Triton is interpreted here in tests, and would run where it is named."""
    choice.store(CPU, [measured(backend)])
    assert choice.first(OP, CPU, F32, WIDTHS) == backend and taken() == "cpu"
    choice.store(CPU, [measured("cpu", dtype="float64")])
    assert taken(dtype=torch.float64) == "reference"


def test_the_op_follows_in_both_directions(cache, monkeypatch):
    choice.store(CPU, [measured()])
    runs = []
    for name in ("cpu", "reference"):
        module = __import__(f"mixpert_kernels.backends.{name}.{OP}", fromlist=[OP])
        for function in (OP, f"{OP}_backward"):
            run = getattr(module, function)
            monkeypatch.setattr(
                module, function, lambda *a, n=name, f=run, **k: runs.append(n) or f(*a, **k)
            )
    x, weight = torch.randn(3, 5, 40), torch.randn(2, 48, 40, requires_grad=True)
    grouped_linear(x, weight, None, ROUTING).sum().backward()
    assert runs == ["reference"] * 2
    grouped_linear(x, weight[:, :47], None, ROUTING).sum().backward()
    assert runs[2:] == ["cpu"] * 2


def test_a_compiled_graph_follows_too(cache):
    choice.store(CPU, [measured(), measured(op="grouped_layer_norm", widths=(40,))])
    torch._dynamo.reset()

    def both(x, gain, weight, routing):
        return grouped_linear(grouped_layer_norm(x, gain, None, routing), weight, None, routing)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    gain, weight = torch.randn(2, 40), torch.randn(2, 48, 40)
    for tokens in (5, 7):
        x = torch.randn(3, tokens, 40)
        assert torch.equal(compiled(x, gain, weight, ROUTING), both(x, gain, weight, ROUTING))


@pytest.mark.parametrize("variable", ["device", "package", "torch", "triton", "extension"])
def test_another_device_or_version_has_another_file(cache, monkeypatch, variable):
    before = choice.store(CPU, [measured()])
    changes = {
        "device": (choice, "device_name", lambda device: "another"),
        "package": (choice, "__version__", "9.9"),
        "torch": (torch, "__version__", "9.9"),
        "triton": (choice, "_version", lambda package: "9.9"),
        "extension": (choice, "build_info", lambda: BuildInfo(True, ("90a",), "99.0")),
    }
    monkeypatch.setattr(*changes[variable])
    choice.forget()
    assert taken() == "cpu"
    assert choice.store(CPU, [measured()]) != before and len(list(cache.iterdir())) == 2
    assert taken() == "reference"


@pytest.fixture
def fake_gpu(cache, monkeypatch):
    """What choice.py asks of a GPU."""
    monkeypatch.setattr(choice, "chip", lambda device: backends.chips.nvidia(90))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H{device.index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(choice, "_driver", lambda: "580.1")
    return monkeypatch


def test_a_gpu_by_name_cuda_and_driver(fake_gpu):
    assert choice.first("route", GPU, torch.bfloat16) == "triton"
    assert "not measured yet" in choice.reason("route", GPU, torch.bfloat16)
    path = choice.store(GPU, [measured("cuda")])
    assert json.loads(path.read_text())["identity"].items() >= {
        ("device", "H0"), ("cuda", "13.0"), ("driver", "580.1")
    }  # fmt: skip
    assert choice.first(OP, GPU, F32, WIDTHS) == "cuda"
    assert backends.in_order(OP, GPU, F32, WIDTHS) == ("cuda", "cpu", "triton", "reference")
    assert choice.first(OP, torch.device("cuda", 1), F32, WIDTHS) == "triton"
    for place, name in ((torch.version, "cuda"), (choice, "_driver")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, (lambda: "581") if name == "_driver" else "13.1")
            assert choice.file_of(choice.identity(GPU)) != path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_has_no_table_and_no_error(cache):
    assert choice.first(OP, GPU, F32, WIDTHS) is None
    assert backends.in_order(OP, "cuda", F32) == BACKENDS
    with pytest.raises(RuntimeError, match="no device cuda:0 here"):
        choice.identity(GPU)


def test_the_shipped_rows_say_what_they_rest_on():
    for row in shipped.ROWS:
        assert row.backend in BACKENDS
        assert row.rests_on.startswith(("measured on ", "not measured yet: ", "the only one"))
    chips = [f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 103, 120)] + ["gfx942"]
    for chip in chips:  # no GPU has measured anything yet
        for dtype in ("float32", "float16", "bfloat16"):
            row = shipped.shipped(chip, OP, dtype)
            assert row.rests_on.startswith("not measured yet: ")
            # one backend for all ops: the fused ones are then bitwise what they fuse
            assert {shipped.shipped(chip, op, dtype).backend for op in ("route", "any")} == {
                row.backend
            }
    assert shipped.shipped("xpu", OP, "float32") is None


def record(cache) -> tuple[Path, dict]:
    path = choice.store(CPU, [measured()])
    return path, json.loads(path.read_text())


DAMAGE = {
    "empty": lambda r: "",
    "cut": lambda r: json.dumps(r)[:-9],
    "not ours": lambda r: "[1, 2]",
    "binary": lambda r: "\udcff",
    "older format": lambda r: json.dumps(r | {"format": 0}),
    "another device": lambda r: json.dumps(r | {"identity": {}}),
    "no rows": lambda r: json.dumps({k: v for k, v in r.items() if k != "rows"}),
    "a field missing": lambda r: json.dumps(r | {"rows": [{"op": OP}]}),
    "a field more": lambda r: json.dumps(r | {"rows": [r["rows"][0] | {"tiles": 8}]}),
    "no dtype": lambda r: json.dumps(r | {"rows": [r["rows"][0] | {"dtype": "nn"}]}),
    "widths": lambda r: json.dumps(r | {"rows": [r["rows"][0] | {"widths": "wide"}]}),
    "backend": lambda r: json.dumps(r | {"rows": [r["rows"][0] | {"backend": 3}]}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_ignored_with_one_warning(cache, kind):
    path, good = record(cache)
    path.write_bytes(DAMAGE[kind](good).encode(errors="surrogateescape"))
    choice.forget()
    with pytest.warns(UserWarning) as caught:
        assert [taken() for _ in range(3)] == ["cpu"] * 3
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert str(path) in choice.table(CPU).fault and "mixpert tune" in choice.table(CPU).fault
    choice.store(CPU, [measured()])  # in its place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken() == "reference"


def test_the_environment_turns_measurements_off(cache, monkeypatch):
    choice.store(CPU, [measured()])
    monkeypatch.setenv("MIXPERT_BACKEND_TABLE", "0")
    choice.forget()
    assert taken() == "cpu"


def test_where_the_files_are(monkeypatch, tmp_path):
    for name in ("MIXPERT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.cache_dir() == tmp_path / ".cache" / "mixpert_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert choice.cache_dir() == Path("/x/mixpert_kernels")
    monkeypatch.setenv("MIXPERT_CACHE_DIR", "/mine")
    assert choice.cache_dir() == Path("/mine")


def test_storing_keeps_the_other_classes(cache):
    choice.store(CPU, [measured(), measured(op="route", widths=(40, 2))])
    choice.store(CPU, [measured("cpu"), measured(widths=(8, 8))])
    rows = choice.table(CPU).measured
    assert {key: row.backend for key, row in rows.items()} == {
        (OP, F32, WIDTHS): "cpu",
        ("route", F32, (40, 2)): "reference",
        (OP, F32, (8, 8)): "reference",
    }


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXPERT_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match=r"cannot be written to .*below .*MIXPERT_CACHE_DIR"):
        choice.store(CPU, [measured()])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(cache, monkeypatch):
    path, good = record(cache)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choice.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        choice.store(CPU, [measured("cpu")])
    assert list(cache.iterdir()) == [path] and json.loads(path.read_text()) == good


def test_whoever_reads_while_others_write_finds_a_whole_file(cache):
    path, _ = record(cache)
    facts, done = choice.identity(CPU), threading.Event()
    found = []

    def write(number):
        for i in range(20):
            choice.store(CPU, [measured(widths=(number, i))])

    def read():
        while not done.is_set():
            found.append(len(choice._parse(path.read_text(), facts)))

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert found and min(found) >= 1 and list(cache.iterdir()) == [path]


def test_the_file_is_read_once_a_process_by_any_thread(cache, monkeypatch):
    choice.store(CPU, [measured()])
    reads, once, got = [], choice._read, []
    together = threading.Barrier(8)

    def read(device):
        reads.append(device)
        time.sleep(0.05)  # the others come meanwhile
        return once(device)

    def call():
        together.wait()
        got.extend(taken() for _ in range(50))

    monkeypatch.setattr(choice, "_read", read)
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["reference"] * 400 and reads == [CPU]


CALLS = [
    Call("route", (24, 2)),
    Call("route", (24, 16, 2)),
    Call("route_grouped_linear", (24, 30), (10, 20)),
    Call("norm_grouped_linear", (24, 30), (10, 20)),
    Call("grouped_layer_norm", (24,)),
    Call("grouped_linear", (24, 30), (10, 20), "relu"),
    Call("grouped_mlp", (24, 40, 16), (), "gelu"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op}{call.widths}")
@given(tiles=st.integers(1, 5), tokens=st.integers(1, 9))
def test_no_choice_depends_on_the_batch(call, tiles, tokens):
    """Forward and backward ask for the widths of the layer, whatever the numbers of tiles and tokens."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for op in ("route_grouped_linear", "norm_grouped_linear", call.op):
            module = __import__(f"mixpert_kernels.ops.{op}", fromlist=[op])
            patch.setattr(module, "pick", lambda *a, **k: asked.append((a, k)) or pick(*a, **k))
        t = call.draw(call.shapes(tiles, tokens, 2), CPU, F32)
        routing = Routing.forced(torch.arange(tiles) % 2, 2)
        call.run(t, routing, "auto")
        if call.differentiable:
            leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
            next(iter(call.run(leaves, routing, "auto").values())).sum().backward()
    wanted = ((call.op, "auto"), {"device": CPU, "dtype": F32, "widths": call.widths})
    assert asked and all(one == wanted for one in asked if one[1].keys() == wanted[1].keys())
    assert sum(one == wanted for one in asked) == (3 if call.differentiable else 1)
