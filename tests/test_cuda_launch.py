"""The launcher of the CUDA backend without a GPU: arguments as C lays them out, and every refusal in plain words."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixpert_kernels
from mixpert_kernels.backends.cuda import _launch
from mixpert_kernels.backends.cuda._launch import TensorMap, launch, pack, parse

TYPES = {
    "P": ctypes.c_void_p,
    "i": ctypes.c_int,
    "q": ctypes.c_longlong,
    "f": ctypes.c_float,
}
FACTS = "threads=128;shared_bytes=49152;block_m=64;P x;P y;i n;q stride;f eps;"
MAP = "threads=128;shared_bytes=0;P y;T x;i n;"


@given(st.lists(st.sampled_from("Piqf"), min_size=1, max_size=12))
def test_layouts_are_those_of_c(codes: list[str]) -> None:
    facts = parse("threads=1;shared_bytes=0;" + "".join(f"{c} a{i};" for i, c in enumerate(codes)))
    fields = [(f"a{i}", TYPES[code]) for i, code in enumerate(codes)]
    made = type("Args", (ctypes.Structure,), {"_fields_": fields})
    assert facts.size == ctypes.sizeof(made)
    assert [f.offset for f in facts.fields] == [getattr(made, name).offset for name, _ in fields]
    values = {f"a{i}": (0.5 if code == "f" else 7 + i) for i, code in enumerate(codes)}
    raw = pack("k", facts, values, None, lambda address: address)
    assert raw == bytes(made(**values))  # the gaps are zeros in both


def test_tensor_maps_are_aligned_to_64_bytes() -> None:
    facts = parse(MAP)
    assert [(f.name, f.offset) for f in facts.fields] == [("y", 0), ("x", 64), ("n", 192)]
    assert facts.size == 256
    given_map = TensorMap(torch.zeros(2, 3), (1, 3))
    args = {"y": None, "x": given_map, "n": 5}
    raw = pack("k", facts, args, lambda value: bytes([value is given_map]) * 128, None)
    assert raw == bytes(64) + b"\1" * 128 + struct.pack("i", 5) + bytes(60)


def test_constants_are_read() -> None:
    assert parse(FACTS).constants == {"threads": 128, "shared_bytes": 49152, "block_m": 64}
    assert parse("threads=32;").fields == () and parse("threads=32;").size == 0


ARGS = {"x": None, "y": None, "n": 1, "stride": 1, "eps": 1.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"extra": 1}, "extra"), ({"n": ...}, "n"), ({"n": ..., "m": 1}, "'m', 'n'")],
)
def test_missing_and_unknown_names(change: dict[str, Any], named: str) -> None:
    args = {name: value for name, value in (ARGS | change).items() if value is not ...}
    with pytest.raises(ValueError, match=rf"^k: wrong arguments: \['?{named}'?\]"):
        pack("k", parse(FACTS), args, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2**31),
        ("n", -(2**31) - 1),
        ("n", 1.5),
        ("n", None),
        ("stride", 2**63),
        ("eps", 1e39),
        ("eps", "1"),
        ("x", 3),
        ("x", TensorMap(torch.zeros(1), (1,))),
    ],
)
def test_what_does_not_fit_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^k: {name} must fit its field, got "):
        pack("k", parse(FACTS), ARGS | {name: value}, None, torch.Tensor.data_ptr)


@pytest.mark.parametrize("name", ["n", "stride", "eps"])
def test_a_tensor_where_a_number_belongs_is_told_by_its_shape(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^k: {name} must fit its field, got a tensor \(2, 3\)"):
        pack("k", parse(FACTS), ARGS | {name: torch.zeros(2, 3)}, None, torch.Tensor.data_ptr)


@pytest.mark.parametrize("value", [None, 3, torch.zeros(2, 2)])
def test_only_a_tensor_map_is_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^k: x must fit its field, got "):
        pack("k", parse(MAP), {"y": None, "x": value, "n": 1}, None, None)


def test_numbers_at_the_ends_of_their_fields_fit() -> None:
    args = ARGS | {"n": -(2**31), "stride": 2**63 - 1, "eps": float("inf")}
    raw = pack("k", parse(FACTS), args, None, None)
    assert raw == struct.pack("PPiqf4x", 0, 0, -(2**31), 2**63 - 1, float("inf"))


class Stub:
    """The extension: notes launches, and refuses as told."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.refusal: str | None = None
        self.size = 40

    def kernels(self) -> dict[str, tuple[str, int]]:
        return {"copy_bf16": (FACTS, self.size), "copy_map": (MAP, 256)}

    def launch(self, *args: Any) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.launches.append(args)

    def tensor_map(self, *args: Any) -> bytes:
        raise RuntimeError("cuTensorMapEncodeTiled: error 1")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    made = Stub()
    monkeypatch.setattr(mixpert_kernels, "_C", made, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    _launch.kernels.cache_clear()
    yield made
    _launch.kernels.cache_clear()


def on(device: str) -> torch.Tensor:
    """A tensor that says it is on a device which is not there."""
    kind = type("On", (torch.Tensor,), {"device": torch.device(device)})
    return torch.empty(4, 4).as_subclass(kind)


def args(**change: Any) -> dict[str, Any]:
    return {"x": on("cuda:1"), "y": on("cuda:1"), "n": 16, "stride": 4, "eps": 0.5} | change


def test_a_launch_reaches_the_extension_with_its_arguments(stub: Stub) -> None:
    given_args = args(x=None)
    launch("copy_bf16", 3, given_args)
    ((name, device, stream, grid, raw),) = stub.launches
    assert (name, device, stream, grid) == ("copy_bf16", 1, 77, 3)
    assert raw == struct.pack("PPiqf4x", 0, given_args["y"].data_ptr(), 16, 4, 0.5)


def test_a_grid_of_0_launches_nothing(stub: Stub) -> None:
    launch("copy_bf16", 0, args())
    launch("copy_bf16", 2**31 - 1, args())
    assert [grid for *_, grid, _ in stub.launches] == [2**31 - 1]


@pytest.mark.parametrize("grid", [2**31, 2**32 + 1, -1])
def test_a_grid_that_is_none(stub: Stub, grid: int) -> None:
    with pytest.raises(ValueError, match=rf"^copy_bf16: the grid must be .* 2147483647 .* {grid}$"):
        launch("copy_bf16", grid, args())
    assert not stub.launches


@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
def test_tensors_on_several_devices(stub: Stub, other: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^copy_bf16: tensors .* one device, got {other}, cuda:1$"
    ):
        launch("copy_bf16", 1, args(y=on(other)))
    with pytest.raises(ValueError, match=rf"^copy_map: .* one device, got {other}, cuda:1$"):
        launch("copy_map", 1, {"x": TensorMap(on(other), (1, 4)), "y": on("cuda:1"), "n": 1})
    with pytest.raises(ValueError, match=r"^copy_bf16: .* one device, got no tensor$"):
        launch("copy_bf16", 1, args(x=None, y=None))
    assert not stub.launches


def test_an_unknown_kernel(stub: Stub) -> None:
    with pytest.raises(ValueError, match=r"^copy_fp8: this build has no such kernel$"):
        launch("copy_fp8", 1, args())


def test_cudas_refusal_carries_the_kernel_its_words_the_grid_and_the_sizes(stub: Stub) -> None:
    stub.refusal = "cudaLaunchKernel: invalid configuration argument"
    wanted = f"copy_bf16: {stub.refusal} (grid 3, n=16, stride=4, eps=0.5)"
    with pytest.raises(RuntimeError) as caught:
        launch("copy_bf16", 3, args())
    assert str(caught.value) == wanted
    with pytest.raises(
        RuntimeError, match=r"^copy_map: cuTensorMapEncodeTiled: error 1 \(grid 1, n=1\)"
    ):
        launch("copy_map", 1, {"x": TensorMap(on("cuda:1"), (1, 4)), "y": None, "n": 1})


def test_a_description_that_is_not_cs_own_layout_is_found_at_once(stub: Stub) -> None:
    stub.size = 36
    with pytest.raises(RuntimeError, match="copy_bf16: arguments of 36 bytes, described as 40"):
        launch("copy_bf16", 1, args())
