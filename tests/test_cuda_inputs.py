"""Bad input never reaches a kernel of csrc/: on fake CUDA tensors, it is refused with a sentence or served another way.

That the other way is right, tests/compiled/test_cuda_inputs.py shows.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from _fake_driver import FakeCuda, cuda_gpu
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends.cuda import _launch

__all__ = ["cuda_gpu"]  # a fixture

B, T, K, N, E = 3, 17, 72, 136, 4


def calls(gpu: FakeCuda) -> dict[str, dict[str, Any]]:
    """A good call of every op."""

    def int32(count: int) -> Tensor:
        return gpu.empty(count, dtype=torch.int32)

    new, routing = gpu.empty, Routing(int32(B), int32(B), int32(E + 1))
    router = ops.RouterWeights(new(K), new(K), new(16, K), new(16), new(E, 16), new(E))
    x, weight, bias = new(B, T, K), [new(E, N, K) for _ in range(3)], [new(E, N) for _ in range(3)]
    images = {name: gpu.empty(B, dtype=torch.int64) for name in ("image_of_tile", "base_tile")}
    images["expert"] = gpu.empty(B, dtype=torch.int64)
    norm = {"norm_weight": new(E, K), "norm_bias": new(E, K)}
    layer = {"weight": weight, "bias": bias}
    sums = {"residual": new(B, T, 3 * N), "scale": new(E, 3 * N)}
    rule = {"strategy": ops.Strategy("direct")}
    two = {"weight1": new(E, N, K), "bias1": new(E, N), "weight2": new(E, K, N), "bias2": new(E, K)}
    return {
        "grouped_layer_norm": {"x": x, "weight": new(E, K), "bias": new(E, K), "routing": routing},
        "grouped_linear": {"x": x, **layer, "routing": routing, **sums},
        "grouped_mlp": {"x": x, **two, "routing": routing, "residual": new(B, T, K), "scale": new(E, K)},
        "norm_grouped_linear": {"x": x, **norm, **layer, "routing": routing},
        "route": {"x": x, "weights": router, **rule, **images},
        "route_grouped_linear": {"x": x, "router": router, **rule, **norm, **layer, **images},
    }  # fmt: skip


OPS = [
    name
    for name in ops.__all__
    if name.islower() and importlib.util.find_spec(f"mixpert_kernels.backends.cuda.{name}")
]
IDS = ("routing", "image_of_tile", "base_tile", "expert")


def run(gpu: FakeCuda, op: str, arguments: dict[str, Any]) -> Any:
    with gpu.running(), torch.no_grad():
        return getattr(ops, op)(**arguments, backend="cuda")


def refused(gpu: FakeCuda, op: str, arguments: dict[str, Any], name: str) -> None:
    """A ValueError that names the op (or the one it consists of) and the argument's value, before any work."""
    with pytest.raises(ValueError, match=r"^(\w+|Routing\.\w+): \w[\w.]* must .*, got ") as error:
        run(gpu, op, arguments)
    assert not gpu.launches, f"{name}: {error.value}"


@pytest.mark.parametrize("op", OPS)
def test_the_good_calls_launch(op: str, cuda_gpu: FakeCuda) -> None:
    run(cuda_gpu, op, calls(cuda_gpu)[op])
    assert any(made.kernel is not None for made in cuda_gpu.launches)


@pytest.mark.parametrize("where", ["cpu", "cuda:1"])
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_two_devices(op: str, where: str, cuda_gpu: FakeCuda) -> None:
    good = calls(cuda_gpu)[op]
    for name, value in good.items():

        def moved(t: object) -> object:
            with cuda_gpu._fake:
                return torch.empty_like(t, device=where) if isinstance(t, Tensor) else t

        if name != "strategy" and (name != "x" or where == "cuda:1"):
            refused(cuda_gpu, op, good | {name: tree_map(moved, value)}, name)
    if "routing" in good:
        for field in ("expert", "order", "offsets"):
            routing = good["routing"]._replace(**{field: moved(getattr(good["routing"], field))})
            refused(cuda_gpu, op, good | {"routing": routing}, field)


@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(op: str, cuda_gpu: FakeCuda) -> None:
    good = calls(cuda_gpu)[op]

    def cast(value: object, dtype: torch.dtype) -> object:
        with cuda_gpu._fake:
            return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) else t, value)

    for name in set(good) - {
        "strategy",
        "weights",
        "router",
    }:  # a router may be of any floating dtype
        wrong = (torch.float32, torch.bool) if name in IDS else (torch.float16, torch.int8)
        for dtype in wrong:
            if name != "x" or op != "route" or not dtype.is_floating_point:
                refused(cuda_gpu, op, good | {name: cast(good[name], dtype)}, name)
    for name in {"weights", "router"} & set(good):
        refused(cuda_gpu, op, good | {name: cast(good[name], torch.int32)}, name)
    wide = {name: cast(value, torch.float64) if name not in IDS else value for name, value in good.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=r"cuda: has no torch\.float64"):
        run(cuda_gpu, op, wide)


def with_size(op: str, good: dict[str, Any], size: str, to: int) -> dict[str, Any]:
    """The call with every dimension of that size changed, and those of sums of it."""
    was = {"B": B, "T": T, "K": K, "N": N, "E": E}[size]
    if not any(was in t.shape for t in tree_leaves(good) if isinstance(t, Tensor)):
        pytest.skip(f"has no {size}")
    sizes = {was: to} | ({3 * N: 3 * to} if size == "N" else {})

    def change(t: object) -> object:
        return t.new_empty([sizes.get(n, n) for n in t.shape]) if isinstance(t, Tensor) else t

    return tree_map(change, good)


@pytest.mark.parametrize("size", ["B", "T", "K", "N", "E"])
@pytest.mark.parametrize("op", OPS)
def test_sizes_of_zero(op: str, size: str, cuda_gpu: FakeCuda) -> None:
    good = calls(cuda_gpu)[op]
    with cuda_gpu._fake:
        bad = with_size(op, good, size, 0)
    refused(cuda_gpu, op, bad, size)
    if size == "E" and "routing" in good:
        routing = good["routing"]._replace(offsets=good["routing"].offsets[:1])
        refused(cuda_gpu, op, good | {"routing": routing}, "a routing over no expert")


@pytest.mark.parametrize("field", ["expert", "order", "offsets"])
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("route")])
def test_a_routing_that_is_not_as_kernels_read_it(op: str, field: str, cuda_gpu: FakeCuda) -> None:
    good = calls(cuda_gpu)[op]
    routing, ids = good["routing"], getattr(good["routing"], field)
    with cuda_gpu._fake:
        apart = ids.new_empty(2 * len(ids))[::2]
        for wrong in (ids.long(), apart, ids.new_empty(len(ids) + 1), ids[None], None):
            refused(cuda_gpu, op, good | {"routing": routing._replace(**{field: wrong})}, field)


def packed(gpu: FakeCuda, op: str) -> dict[str, Any]:
    """The good call on packed rows."""
    good, rows, cu = calls(gpu)[op], B * T, gpu.empty(B + 1, dtype=torch.int32)
    flat = {n: good[n].flatten(0, 1) for n in ("x", "residual") if n in good}
    assert flat["x"].shape[0] == rows
    if "routing" in good:
        return good | flat | {"routing": good["routing"]._replace(cu_seqlens=cu)}
    return good | flat | {"cu_seqlens": cu}


@pytest.mark.parametrize("op", OPS)
def test_packed_rows_that_are_not_as_kernels_read_them(op: str, cuda_gpu: FakeCuda) -> None:
    with cuda_gpu._fake:
        good = packed(cuda_gpu, op)
    run(cuda_gpu, op, good)
    cuda_gpu.launches.clear()
    cu = good["routing"].cu_seqlens if "routing" in good else good["cu_seqlens"]

    def with_bounds(wrong: object) -> dict[str, Any]:
        if "routing" in good:
            return good | {"routing": good["routing"]._replace(cu_seqlens=wrong)}
        return good | {"cu_seqlens": wrong}

    with cuda_gpu._fake:
        elsewhere = torch.empty_like(cu, device="cuda:1")
        apart = cu.new_empty(2 * len(cu))[::2]
        wrongs = (cu.long(), apart, elsewhere, cu[:-1], cu[None], None)
        tiled = good | {"x": good["x"].unflatten(0, (B, T))}
    for wrong in wrongs:
        refused(cuda_gpu, op, with_bounds(wrong), f"cu_seqlens {wrong}")
    refused(cuda_gpu, op, tiled, "x of tiles beside cu_seqlens")


# Layouts: every one is served.


def far_apart(t: Tensor) -> Tensor:
    """Past 32 bits from one entry of the first dimension to the next, and one number off."""
    strides = [2**31 + 8, *t.stride()[1:]]
    size = (t.shape[0] - 1) * strides[0] + t[0].numel() + 1
    return t.new_empty(size).as_strided(t.shape, strides, 1)


LAYOUTS = {
    "one number off": lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape),
    "rows of odd length": lambda t: t.new_empty(*t.shape[:-1], t.shape[-1] + 1)[..., 1:],
    "last dimension apart": lambda t: t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2],
    "turned": lambda t: t.new_empty(t.shape[::-1]).permute(*range(t.ndim)[::-1]),
    "one row for all": lambda t: t.new_empty(t.shape[-1]).expand(t.shape),
    "far apart": far_apart,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_any_layout_is_served(op: str, layout: str, cuda_gpu: FakeCuda) -> None:
    good = calls(cuda_gpu)[op]

    def change(t: object) -> object:
        return LAYOUTS[layout](t) if isinstance(t, Tensor) and t.is_floating_point() else t

    with cuda_gpu._fake:
        laid = tree_map(change, {k: v for k, v in good.items() if k not in ("routing", "strategy")})
    run(cuda_gpu, op, good | laid)
    assert any(made.kernel is not None for made in cuda_gpu.launches)


# Sizes past 32 bits.


def test_strides_have_64_bits_in_every_kernel(cuda_gpu: FakeCuda) -> None:
    for name, facts in cuda_gpu.facts.items():
        for field in facts.fields:
            if field.name.startswith("stride"):
                assert field.code == "q", f"{name}: {field.name} is {field.code}"


@pytest.mark.parametrize("op", OPS)
def test_more_numbers_than_32_bits_count(op: str, cuda_gpu: FakeCuda) -> None:
    """70,000 tiles of 729 tokens: 3.7e9 features."""
    good, batch = calls(cuda_gpu)[op], 70_000
    with cuda_gpu._fake:
        many = with_size(op, with_size(op, good, "B", batch), "T", 729)
    y = run(cuda_gpu, op, many)
    assert (y if isinstance(y, Tensor) else y[0]).shape[0] == batch
    for made in cuda_gpu.launches:
        assert made.kernel is None or made.config <= _launch.MAX_GRID


@pytest.mark.parametrize("size", ["B", "T", "K", "N"])
@pytest.mark.parametrize("op", OPS)
def test_a_size_that_32_bits_do_not_hold_is_refused(op: str, size: str, cuda_gpu: FakeCuda) -> None:
    """By the launcher at the latest; no number is ever cut to 32 bits."""
    good = calls(cuda_gpu)[op]
    with cuda_gpu._fake:
        large = with_size(op, good, size, 2**31 + 8)
    with pytest.raises(ValueError, match=r"must fit its field|at most \d+ blocks"):
        run(cuda_gpu, op, large)


# The launcher itself.


@pytest.fixture
def norm(cuda_gpu: FakeCuda) -> dict[str, Any]:
    """A launch of grouped_layer_norm, as its host function makes it."""
    run(cuda_gpu, "grouped_layer_norm", calls(cuda_gpu)["grouped_layer_norm"])
    made = cuda_gpu.launches[-1]
    return {"kernel": made.name, "grid": made.config, "args": made.args}


@pytest.mark.parametrize("grid", [-1, -(2**31), 2**31, 2**40])
def test_a_grid_that_cuda_does_not_take(grid: int, norm: dict, cuda_gpu: FakeCuda) -> None:
    with pytest.raises(ValueError, match=r"^grouped_layer_norm_bf16: the grid must be "):
        _launch.launch(norm["kernel"], grid, norm["args"])


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63, 1.5, "17"])
def test_a_number_that_does_not_fit(value: object, norm: dict, cuda_gpu: FakeCuda) -> None:
    with cuda_gpu.running(), pytest.raises(ValueError, match=r"bf16: tokens must fit its field"):
        _launch.launch(norm["kernel"], 1, norm["args"] | {"tokens": value})


def test_arguments_that_are_missing_or_unknown(norm: dict, cuda_gpu: FakeCuda) -> None:
    args = dict(norm["args"])
    args["token"] = args.pop("tokens")
    with (
        cuda_gpu.running(),
        pytest.raises(ValueError, match=r"wrong arguments: \['token', 'tokens"),
    ):
        _launch.launch(norm["kernel"], 1, args)


def test_what_cuda_says_comes_with_the_kernel_and_its_sizes(
    norm: dict, cuda_gpu: FakeCuda, monkeypatch
) -> None:
    def launch(*_):
        raise RuntimeError("cudaLaunchKernel: invalid argument")

    monkeypatch.setattr(cuda_gpu, "launch", launch)
    said = rf"^{norm['kernel']}: cudaLaunchKernel: invalid argument \(grid 5, .*tokens=17, width=72"
    with cuda_gpu.running(), pytest.raises(RuntimeError, match=said):
        _launch.launch(norm["kernel"], 5, norm["args"])
