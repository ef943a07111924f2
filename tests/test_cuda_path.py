"""What the host does on the way of a batch through the CUDA backend: on fake CUDA tensors, for every routing at once.

How many launches, with memsets counted apart; nothing that waits for the device; no copy around attention; grids that
the host knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from _fake_driver import FakeCuda
from _fake_driver import cuda_gpu as at_sm_90
from _fake_gpu import ATTENTION, Launch
from _fake_tower import FUSED, forward, ids, make, segment
from _towers import WIDTH
from torch import Tensor

from mixpert_kernels import Routing, ops

OUT = 16  # of the small towers' projector: rows of 12 halves are no multiple of 16 bytes, and are copied first

MEMSETS = ("aten::zeros", "aten::new_zeros", "aten::zeros_like", "aten::zero_", "aten::fill_")
IDS_OF_THE_OUTPUT = "aten::_to_copy"  # int32 to int64, after all else
LINEAR, ROUTED = "grouped_linear", "route_grouped_linear"
TWO, ONE = ["grouped_layer_norm", LINEAR], ["norm_grouped_linear"]
PROJECTOR = [LINEAR] * 2
__all__ = ["at_sm_90"]  # a fixture


@pytest.fixture
def cuda_gpu(at_sm_90: FakeCuda) -> FakeCuda:
    """A GPU of sm_80; tests that say so take another."""
    at_sm_90.arch = 80
    return at_sm_90


def rest_of_layer(norm_linear: list[str]) -> list[str]:
    return [ATTENTION, LINEAR, *norm_linear, LINEAR]


def layer(norm_linear: list[str]) -> list[str]:
    return norm_linear + rest_of_layer(norm_linear)


def op_of(name: str) -> str:
    """The op a kernel is of."""
    return re.sub(r"_(bf16|fp16|fp32)(_\w+)?$", "", name)


def without_memsets(launches: list[Launch]) -> list[str]:
    return [op_of(made.name) for made in launches if made.name not in MEMSETS]


def routed(gpu: FakeCuda, tower, batch: int, **call: object) -> list[str]:
    """Routing, expert segment and projector, as launches of ops."""
    *names, last = without_memsets(forward(gpu, tower, batch, **call))
    assert last == IDS_OF_THE_OUTPUT
    return names


# One image: T = 196 and N = 2304 are less than one wave of blocks on 132 multiprocessors, T = 729 and N = 3456 more.


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(("kind", "norm_linear", "most"), [("base", ONE, 10), ("so400m", TWO, 13)])
def test_one_image_takes_ten_launches_below_one_wave_and_thirteen_above(
    kind: str, norm_linear: list[str], most: int, arch: int, cuda_gpu: FakeCuda
) -> None:
    cuda_gpu.arch = arch
    names = routed(cuda_gpu, make(cuda_gpu, kind), 1)
    assert names == [ROUTED, *rest_of_layer(norm_linear), *layer(norm_linear), *PROJECTOR]
    assert len([name for name in names if name != ATTENTION]) == most


@pytest.mark.parametrize("num_experts", [1, 2, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 20, 64])
def test_launches_do_not_depend_on_experts(
    batch: int, num_experts: int, cuda_gpu: FakeCuda
) -> None:
    """Nor on the batch, but for the LayerNorms."""
    names = routed(cuda_gpu, make(cuda_gpu, "base", num_experts=num_experts), batch)
    fits = [part for part in (ONE, TWO) if names[-2 - len(layer(part)) : -2] == layer(part)]
    assert len(fits) == 1, names
    assert names == [ROUTED, *rest_of_layer(fits[0]), *layer(fits[0]), *PROJECTOR]
    assert fits[0] == (ONE if batch == 1 else TWO if batch >= 5 else fits[0])
    assert len(names) - names.count(ATTENTION) <= (10 if fits[0] is ONE else 13)


@pytest.mark.parametrize("kind", [*FUSED, "so400m"])
def test_a_layer_with_its_routing_given(kind: str, cuda_gpu: FakeCuda) -> None:
    """Of ours and of torch's, copies included: so no copy stands around the attention call either."""
    tokens, norm_linear = (729, TWO) if kind == "so400m" else (17, ONE)
    segment(cuda_gpu, make(cuda_gpu, kind, layers=1, out=OUT), 3, tokens)
    assert without_memsets(cuda_gpu.launches) == layer(norm_linear) + PROJECTOR
    memsets = [made.name for made in cuda_gpu.launches if made.name in MEMSETS]
    assert len(memsets) == (0 if norm_linear is TWO else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_takes_the_same_launches(dtype: torch.dtype, cuda_gpu: FakeCuda) -> None:
    tower = cuda_gpu.move(make(cuda_gpu, "base"), dtype)
    x = cuda_gpu.empty(1, 196, 768, dtype=dtype)
    with cuda_gpu.running() as launches, torch.no_grad():
        tower._routed_segment(x, None, None, None, (), {})
    names = without_memsets(launches)
    assert names == [ROUTED, *rest_of_layer(ONE), *layer(ONE), *PROJECTOR]


@pytest.mark.parametrize("strategy", ["direct", "score_threshold", "score_difference"])
@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("images", ["a tile an image", "forced", "tiles", "tiles, forced"])
def test_routing_and_segment_wait_for_nothing(
    images: str, hidden: int | None, strategy: str, cuda_gpu: FakeCuda
) -> None:
    gpu = cuda_gpu
    tower = make(gpu, router_hidden=hidden, routing=strategy, out=OUT)
    call = {}
    if images.startswith("tiles"):
        call = {"image_of_tile": ids(gpu, 6), "base_tile": ids(gpu, 2)}
    if images.endswith("forced"):
        call["expert"] = ids(gpu, 2 if "base_tile" in call else 6)
    names = without_memsets(forward(gpu, tower, 6, **call))
    assert len(names) <= 10 + 2 + 2, names  # two of attention; the base tiles' ids in the output
    with gpu.running(), torch.no_grad():
        routing = tower.route(gpu.empty(6, 5, WIDTH), **call)
    assert routing.expert.shape == (6,) and routing.expert.device.type == "cuda"


# Backward.


def backwards(gpu: FakeCuda) -> dict[str, list]:
    new = gpu.empty

    def int32(count: int) -> Tensor:
        return new(count, dtype=torch.int32)

    def float32(*shape: int) -> Tensor:
        return new(*shape, dtype=torch.float32)

    routing = [int32(6), int32(6), int32(5), None]
    return {
        "grouped_layer_norm": [
            new(6, 17, 32), new(6, 17, 32), new(4, 32), new(4, 32), float32(6, 17, 1), float32(6, 17, 1), *routing,
        ],
        "grouped_linear": [
            new(6, 17, 72), new(6, 17, 32), [new(4, 24, 32) for _ in range(3)], [new(4, 24) for _ in range(3)],
            new(6, 17, 72), *routing, "gelu", new(4, 72), [True] * 4,
        ],
        "grouped_mlp": [
            new(6, 17, 32), new(6, 17, 32), new(4, 72, 32), new(4, 72), new(4, 32, 72), new(4, 32), new(6, 17, 72),
            new(6, 17, 32), *routing, "gelu_tanh", new(4, 32), [True] * 6,
        ],
        "route": [
            float32(6, 4), float32(6, 32), new(6, 17, 32), None, None, new(32), new(32), new(16, 32), new(16),
            new(4, 16), float32(6, 4), float32(6, 32), 1e-5, True,
        ],
    }  # fmt: skip


# Launches of ours; the sums for three biases and a scale are two.
KERNELS = {"grouped_layer_norm": 2, "grouped_linear": 5, "grouped_mlp": 8, "route": 0}


@pytest.mark.parametrize("op", KERNELS)
def test_backward_waits_for_nothing_either(op: str, cuda_gpu: FakeCuda) -> None:
    args = backwards(cuda_gpu)[op]
    with cuda_gpu.running() as launches:
        grads = getattr(torch.ops.mixpert, f"{op}_backward")(*args, "auto")
    assert len([made for made in launches if made.kernel is not None]) <= KERNELS[op], launches
    assert all(grad.device.type == "cuda" for grad in torch.utils._pytree.tree_leaves(grads))


# Packed rows: how long the tiles are stands on the device alone, so grids follow from R and B.


def packed_calls(gpu: FakeCuda, rows: int, tiles: int) -> dict[str, Callable[[], object]]:
    """Every op, its backward too; what it launches is in PACKED."""
    new = gpu.empty

    def int32(count: int) -> Tensor:
        return new(count, dtype=torch.int32)

    def float32(*shape: int) -> Tensor:
        return new(*shape, dtype=torch.float32)

    x, cu = new(rows, 64), int32(tiles + 1)
    routing = Routing(int32(tiles), int32(tiles), int32(5), None, cu)
    gain, weight, bias = (new(4, 64), new(4, 64)), [new(4, 72, 64)] * 3, [new(4, 72)] * 3
    two = (new(4, 72, 64), new(4, 72), new(4, 64, 72), new(4, 64))
    router = ops.RouterWeights(new(64), new(64), None, None, new(4, 64), new(4))
    images = {"image_of_tile": ids(gpu, tiles), "base_tile": ids(gpu, 1), "cu_seqlens": cu}
    direct, backward = ops.Strategy("direct"), torch.ops.mixpert
    wide = new(rows, 216)
    scored, means = float32(tiles, 4), float32(tiles, 64)
    return {
        "grouped_layer_norm": lambda: ops.grouped_layer_norm(x, *gain, routing),
        "grouped_linear": lambda: ops.grouped_linear(x, weight, bias, routing),
        "grouped_mlp": lambda: ops.grouped_mlp(x, *two, routing),
        "norm_grouped_linear": lambda: ops.norm_grouped_linear(x, *gain, weight, bias, routing),
        "route": lambda: ops.route(x, router, direct, **images),
        "route_grouped_linear": lambda: ops.route_grouped_linear(
            x, router, direct, *gain, weight, bias, **images
        ),
        "grouped_layer_norm_backward": lambda: backward.grouped_layer_norm_backward(
            x, x, *gain, *[float32(rows, 1)] * 2, *routing.ids, "auto"
        ),
        "grouped_linear_backward": lambda: backward.grouped_linear_backward(
            wide, x, weight, bias, wide, *routing.ids, "gelu", new(4, 216), [True] * 4, "auto"
        ),
        "grouped_mlp_backward": lambda: backward.grouped_mlp_backward(
            x, x, *two, new(rows, 72), x, *routing.ids, "gelu", new(4, 64), [True] * 6, "auto"
        ),
        "route_backward": lambda: backward.route_backward(
            scored, means, x, cu, None, *router[:5], scored, means, 1e-5, True, "auto"
        ),
    }


PARTS, SUMS, OUTER = "activation_backward", "sum_by_expert", "grouped_outer"
DX = "grouped_linear_backward"
PACKED = {
    "grouped_layer_norm": ["grouped_layer_norm"],
    "grouped_linear": [LINEAR],
    "grouped_mlp": [LINEAR] * 2,
    "norm_grouped_linear": TWO,
    "route": ["route"],
    "route_grouped_linear": ["route", *TWO],
    "grouped_layer_norm_backward": ["grouped_layer_norm_backward", SUMS],
    "grouped_linear_backward": [PARTS, SUMS, SUMS, DX, OUTER],
    "grouped_mlp_backward": [PARTS, SUMS, DX, OUTER, PARTS, SUMS, OUTER, DX],
    "route_backward": [],
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (3, 7), (1000, 5), (46_656, 64)])
def test_packed_rows_wait_for_nothing(rows: int, tiles: int, arch: int, cuda_gpu: FakeCuda) -> None:
    cuda_gpu.arch = arch
    for name, call in packed_calls(cuda_gpu, rows, tiles).items():
        with cuda_gpu.running() as launches, torch.no_grad():
            call()
        made = [one for one in launches if one.kernel is not None]
        assert [op_of(one.name) for one in made] == PACKED[name], name


# A step of training: what grouped_mlp keeps.


def test_training_takes_grouped_mlp(cuda_gpu: FakeCuda) -> None:
    """Which keeps one pre-activation; inference does not call it but for the projector."""
    tower = make(cuda_gpu, "base", layers=1).train()
    x = cuda_gpu.empty(1, 196, 768)
    with cuda_gpu.running() as launches:
        y, _ = tower._routed_segment(x, None, None, None, (), {})
    names = without_memsets(launches)
    assert y.requires_grad and "norm_grouped_linear" not in names and ROUTED not in names
