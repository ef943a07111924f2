"""What the host does on the way of a batch through the Triton backend: on fake CUDA tensors, for every routing at once.

How many launches, nothing that waits for the device, no copy around attention, no new kernel variant for a new batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import pytest
import torch
from _fake_gpu import ATTENTION, FakeGpu, HostWaits, Launch, gpu
from _fake_tower import FUSED, forward, ids, make, pixels, segment
from _towers import WIDTH
from torch import Tensor

pytest.importorskip("triton")

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.modules.prenorm import attention

__all__ = ["gpu"]  # a fixture

LAYER = [
    "_grouped_layer_norm_kernel", "_grouped_linear_kernel", ATTENTION, "_grouped_linear_kernel",
    "_grouped_layer_norm_kernel", "_grouped_linear_kernel", "_grouped_linear_kernel",
]  # fmt: skip
PROJECTOR = ["_grouped_linear_kernel"] * 2


# What the watch itself is worth.

WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: x.long().bincount(),
    "from the host": lambda x: torch.tensor([0, 2], device=x.device),
}


@pytest.mark.parametrize("way", WAITING)
def test_the_watch_refuses_what_waits(way: str, gpu: FakeGpu) -> None:
    x = gpu.empty(4, dtype=torch.float32)
    known = (HostWaits, RuntimeError, torch._subclasses.fake_tensor.DynamicOutputShapeException)
    with gpu.running(), pytest.raises(known):
        WAITING[way](x)


def test_the_watch_counts_what_launches(gpu: FakeGpu) -> None:
    x = gpu.empty(4, 6)
    with gpu.running() as launches:
        y = x.t()[1:].unsqueeze(0)
        assert launches == []
        y.contiguous() + torch.zeros_like(y)
    assert [launch.name for launch in launches] == ["aten::clone", "aten::zeros_like", "aten::add"]


# The path.


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", [*FUSED, "so400m"])
def test_a_layer_is_seven_launches_and_the_projector_two(
    kind: str, arch: int, gpu: FakeGpu
) -> None:
    """Of ours and of torch's, copies and memsets included: so no copy stands around the attention call either."""
    gpu.arch = arch
    assert segment(gpu, make(gpu, kind), 3) == 2 * LAYER + PROJECTOR
    assert segment(gpu, make(gpu, kind, layers=1), 3) == LAYER + PROJECTOR


@pytest.mark.parametrize("num_experts", [1, 2, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 20, 64])
def test_launches_depend_on_neither_experts_nor_batch(
    batch: int, num_experts: int, gpu: FakeGpu
) -> None:
    tower = make(gpu, num_experts=num_experts)
    assert segment(gpu, tower, batch) == 2 * LAYER + PROJECTOR
    assert len(forward(gpu, tower, batch)) == len(forward(gpu, make(gpu), 3))


@pytest.mark.parametrize("strategy", ["direct", "score_threshold", "score_difference"])
@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("images", ["a tile an image", "forced", "tiles", "tiles, forced"])
def test_routing_and_segment_wait_for_nothing(
    images: str, hidden: int | None, strategy: str, gpu: FakeGpu
) -> None:
    """<= 8 launches a layer and 2 for the projector, those of routing and of the results' dtype included."""
    tower = make(gpu, router_hidden=hidden, routing=strategy)
    call = {}
    if images.startswith("tiles"):
        call = {"image_of_tile": ids(gpu, 6), "base_tile": ids(gpu, 2)}
    if images.endswith("forced"):
        call["expert"] = ids(gpu, 2 if "base_tile" in call else 6)
    names = [launch.name for launch in forward(gpu, tower, 6, **call)]
    assert len(names) <= 2 * 8 + 2, names
    assert names.count(ATTENTION) == 2
    with gpu.running(), torch.no_grad():
        routing = tower.route(gpu.empty(6, 5, WIDTH), **call)
    assert routing.expert.shape == (6,) and routing.expert.device.type == "cuda"


BACKWARDS: dict[str, Callable[[Callable, Callable], list]] = {
    "grouped_layer_norm": lambda new, ids: [
        new(6, 17, 32), new(6, 17, 32), new(4, 32), new(4, 32), new(6, 17, 1, dtype=torch.float32),
        new(6, 17, 1, dtype=torch.float32), ids(6), ids(6), ids(5), None,
    ],
    "grouped_linear": lambda new, ids: [
        new(6, 17, 72), new(6, 17, 32), [new(4, 24, 32) for _ in range(3)], [new(4, 24) for _ in range(3)],
        new(6, 17, 72), ids(6), ids(6), ids(5), None, "gelu", new(4, 72), [True] * 4,
    ],
    "grouped_mlp": lambda new, ids: [
        new(6, 17, 32), new(6, 17, 32), new(4, 72, 32), new(4, 72), new(4, 32, 72), new(4, 32), new(6, 17, 72),
        new(6, 17, 32), ids(6), ids(6), ids(5), None, "gelu_tanh", new(4, 32), [True] * 6,
    ],
    "route": lambda new, ids: [
        new(6, 4, dtype=torch.float32), new(6, 32, dtype=torch.float32), new(6, 17, 32), None, None, new(32), new(32),
        new(16, 32), new(16), new(4, 16), new(6, 4, dtype=torch.float32), new(6, 32, dtype=torch.float32), 1e-5, True,
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", BACKWARDS)
def test_backward_waits_for_nothing_either(op: str, gpu: FakeGpu) -> None:
    def int32(count: int) -> Tensor:
        return gpu.empty(count, dtype=torch.int32)

    args = BACKWARDS[op](gpu.empty, int32)
    with gpu.running() as launches:
        grads = getattr(torch.ops.mixpert, f"{op}_backward")(*args, "auto")
    assert any(launch.kernel is not None for launch in launches)
    assert all(grad.device.type == "cuda" for grad in torch.utils._pytree.tree_leaves(grads))


@pytest.mark.parametrize(("heads", "width"), [(16, 1152), (12, 768), (4, 32)])
def test_no_copy_is_made_around_the_attention_call(heads: int, width: int, gpu: FakeGpu) -> None:
    qkv = gpu.empty(3, 17, 3 * width)
    with gpu.running() as launches:
        y = attention(qkv, heads)
    assert [launch.name for launch in launches] == [ATTENTION]
    assert y.shape == (3, 17, width) and y.is_contiguous()


def test_the_stand_in_for_attention_has_the_layout_of_flash_attention(gpu: FakeGpu) -> None:
    q, k, v = gpu.empty(2, 17, 3, 4, 72).permute(2, 0, 3, 1, 4).unbind()
    with gpu.running():
        got = gpu.attention(q, k, v)
        want = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    assert got.shape == want.shape and got.stride() == want.stride()


# Compiled variants.


@functools.cache
def _binder(kernel: object, arch: int, marked: bool) -> Callable:
    """What Triton itself asks, of a launch's arguments, which compiled variant serves it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # interpreted
        kernel = JITFunction(kernel.fn, **(kernel.kwargs if marked else {}))
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def variants(gpu: FakeGpu, launches: list[Launch], marked: bool = True) -> set[Hashable]:
    """One entry for each kernel that Triton would have compiled for these launches.

    Not ``marked``: as if no argument were ``do_not_specialize``.
    """
    found = set()
    with gpu.running():
        for launch in launches:
            config = {name: getattr(launch.config, name) for name in ("num_warps", "num_stages")}
            bind = _binder(launch.kernel, gpu.arch, marked)
            _, specialization, options = bind(**launch.args, **config)
            found.add((launch.name, str(specialization), str(options)))
    return found


def of_a_batch(gpu: FakeGpu, tower: FusedMixpertTower, batch: int, **call: object) -> set[Hashable]:
    with gpu.running() as launches, torch.no_grad():
        tower(pixels(gpu, tower, batch), **call)
    return variants(gpu, [launch for launch in launches if launch.kernel is not None])


@pytest.mark.parametrize("arch", [80, 90])
def test_no_batch_adds_a_compiled_variant(arch: int, gpu: FakeGpu) -> None:
    gpu.arch = arch
    tower = make(gpu, "so400m")
    want = of_a_batch(gpu, tower, 2)
    assert len({name for name, *_ in want}) >= 3
    for batch in (1, 3, 4, 7, 8, 15, 16, 17, 20, 32, 685):
        assert of_a_batch(gpu, tower, batch) == want, batch


def test_no_number_of_tiles_or_images_adds_a_compiled_variant(gpu: FakeGpu) -> None:
    tower = make(gpu, "so400m")

    def of(tiles: int, images: int) -> set[Hashable]:
        call = {"image_of_tile": ids(gpu, tiles), "base_tile": ids(gpu, images)}
        return of_a_batch(gpu, tower, tiles, **call)

    want = of(6, 2)
    for tiles, images in ((5, 1), (1, 1), (16, 16), (17, 3), (32, 16)):
        assert of(tiles, images) == want, (tiles, images)


def test_a_number_of_tokens_adds_no_compiled_variant(gpu: FakeGpu) -> None:
    tower = make(gpu, "so400m")

    def of(tokens: int) -> set[Hashable]:
        segment(gpu, tower, 3, tokens)
        return variants(gpu, [launch for launch in gpu.launches if launch.kernel is not None])

    want = of(729)
    for tokens in (730, 576, 17, 1):
        assert of(tokens) == want, tokens


def test_the_key_is_one_that_a_batch_could_change(gpu: FakeGpu) -> None:
    """Without its marks Triton would compile the same launch for a batch of 1, for 16s and for the rest."""
    tower, marked, unmarked = make(gpu), set(), set()
    for batch in (1, 2, 3, 16, 32):
        segment(gpu, tower, batch)
        launch = next(made for made in gpu.launches if "linear" in made.name)
        marked |= variants(gpu, [launch])
        unmarked |= variants(gpu, [launch], marked=False)
    assert (len(marked), len(unmarked)) == (1, 3)


# Packed rows.

NORMED = ["_grouped_layer_norm_kernel", "_grouped_linear_kernel"]
OF_LINEAR = [
    "_activation_backward_kernel", "_sum_by_expert_kernel", "_linear_dx_kernel", "_grouped_outer_kernel",
]  # fmt: skip


def packed(gpu: FakeGpu, tiles: int, rows: int) -> list[Launch]:
    """The launches of a layer of packed rows, forward and backward; which rows are whose, nobody knows."""

    def int32(count: int) -> Tensor:
        return gpu.empty(count, dtype=torch.int32)

    call, x, cu = torch.ops.mixpert, gpu.empty(rows, 1280), int32(tiles + 1)
    gain, weight, bias = gpu.empty(4, 1280), gpu.empty(4, 1280, 1280), gpu.empty(4, 1280)
    router = (gain[0], gain[0], None, None, gpu.empty(4, 1280), gain[0, :4])
    rule = (1e-5, "score_difference", 0.1, "runner_up")
    with gpu.running() as launches, torch.no_grad():
        scores, pooled, *ids = call.route(x, cu, None, None, None, *router, *rule, "auto")
        ids.append(cu)
        y, mean, rstd = call.grouped_layer_norm(x, gain, gain, *ids, 1e-6, "auto")
        z, pre = call.grouped_linear(y, [weight], [bias], *ids, "gelu", x, None, True, "auto")
        assert z.shape == pre.shape == x.shape and mean.shape == (rows, 1)
        rest = (pre, *ids, "gelu", None, [True] * 3 + [False], "auto")
        dx, *_ = call.grouped_linear_backward(z, y, [weight], [bias], *rest)
        dx, *_ = call.grouped_layer_norm_backward(dx, x, gain, gain, mean, rstd, *ids, "auto")
        assert dx.shape == x.shape
        given = (x, cu, None, *router[:5], scores, pooled, 1e-5, True, "auto")
        assert call.route_backward(scores, pooled, *given)[0].shape == x.shape
    return [launch for launch in launches if launch.kernel is not None]


@pytest.mark.parametrize("arch", [80, 90])
def test_neither_tiles_nor_rows_add_a_launch_or_a_compiled_variant(arch: int, gpu: FakeGpu) -> None:
    gpu.arch = arch
    launches = packed(gpu, 3, 1000)
    assert [launch.name for launch in launches] == [
        "_route_kernel", *NORMED, *OF_LINEAR, "_grouped_layer_norm_backward_kernel",
        *["_sum_by_expert_kernel"] * 2, "_route_image_backward_kernel",
        "_route_parameters_backward_kernel", "_route_features_backward_kernel",
    ]  # fmt: skip
    want = variants(gpu, launches)
    for tiles, rows in ((1, 1), (1, 4096), (2, 17), (16, 16), (17, 4801), (64, 65536)):
        assert variants(gpu, packed(gpu, tiles, rows)) == want, (tiles, rows)
