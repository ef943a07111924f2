"""Every op of every backend on a GPU: forward and backward against float64, by every kernel that gives the same bits,
twice, and past 32-bit offsets.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _on_gpu import DEVICE, EXPERTS, backend, every_dtype, ids, routing
from torch import Tensor

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends.cuda import _configs
from mixpert_kernels.testing import assert_as_accurate

__all__ = ["backend"]  # a fixture
pytestmark = pytest.mark.gpu

EXPERT = (2, 0, 2, 2, 0)  # of each tile; expert 1 has none
SIZES = {"odd": (17, 72, 136), "so400m": (729, 1152, 4304)}  # T, K, N


class Leaves:
    """Random inputs, rounded to ``low`` and then widened to the dtype asked for; each is a leaf."""

    def __init__(self, low: torch.dtype, dtype: torch.dtype) -> None:
        self.low, self.dtype = low, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * std + mean
        leaf = values.to(DEVICE, self.low).to(self.dtype).requires_grad_()
        self.made[name] = leaf
        return leaf

    def results(self, y: Tensor) -> dict[str, Tensor]:
        """``y`` and the gradients of a random linear function of it."""
        dy = torch.randn(y.shape, generator=self.generator).to(DEVICE, self.low).to(y.dtype)
        grads = torch.autograd.grad(y, list(self.made.values()), dy)
        named = zip(self.made, grads, strict=True)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in named}


def grouped_linear(new: Leaves, size: tuple[int, int, int], backend: str) -> Tensor:
    tokens, depth, width = size
    weights = [new(f"weight{i}", EXPERTS, width, depth, std=depth**-0.5) for i in range(3)]
    return ops.grouped_linear(
        new("x", len(EXPERT), tokens, depth),
        weights,
        [new(f"bias{i}", EXPERTS, width) for i in range(3)],
        routing(*EXPERT),
        activation="gelu",
        residual=new("residual", len(EXPERT), tokens, 3 * width),
        scale=new("scale", EXPERTS, 3 * width),
        backend=backend,
    )


def grouped_mlp(new: Leaves, size: tuple[int, int, int], backend: str) -> Tensor:
    tokens, depth, width = size
    return ops.grouped_mlp(
        new("x", len(EXPERT), tokens, depth),
        new("weight1", EXPERTS, width, depth, std=depth**-0.5),
        new("bias1", EXPERTS, width),
        new("weight2", EXPERTS, depth, width, std=width**-0.5),
        new("bias2", EXPERTS, depth),
        routing(*EXPERT),
        activation="gelu_tanh",
        residual=new("residual", len(EXPERT), tokens, depth),
        backend=backend,
    )


def grouped_layer_norm(new: Leaves, size: tuple[int, int, int], backend: str) -> Tensor:
    tokens, depth, _ = size
    x = new("x", len(EXPERT), tokens, depth, mean=0.5)
    weight, bias = new("weight", EXPERTS, depth, mean=1.0), new("bias", EXPERTS, depth)
    return ops.grouped_layer_norm(x, weight, bias, routing(*EXPERT), backend=backend)


def router(new: Leaves, depth: int, hidden: int) -> ops.RouterWeights:
    return ops.RouterWeights(
        new("norm_weight", depth, mean=1.0),
        new("norm_bias", depth),
        new("hidden_weight", hidden, depth, std=depth**-0.5),
        new("hidden_bias", hidden),
        new("weight", EXPERTS, hidden, std=hidden**-0.5),
        new("bias", EXPERTS),
    )


def route(new: Leaves, size: tuple[int, int, int], backend: str) -> Tensor:
    tokens, depth, width = size
    x = new("x", len(EXPERT), tokens, depth)
    given = (x, router(new, depth, width), ops.Strategy("direct"))
    return ops.route(*given, backend=backend).scores


OPS = (grouped_linear, grouped_mlp, grouped_layer_norm, route)
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def run(op: Callable, size: str, backend: str, low: torch.dtype, dtype: torch.dtype) -> dict:
    new = Leaves(low, dtype)
    return new.results(op(new, SIZES[size], backend))


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@every_dtype
@pytest.mark.parametrize("size", SIZES)
@every_op
def test_as_accurate_as_plain_pytorch(
    op: Callable, size: str, dtype: torch.dtype, backend: str
) -> None:
    got = run(op, size, backend, dtype, dtype)
    plain = run(op, size, "reference", dtype, dtype)
    truth = run(op, size, "reference", dtype, torch.float64)
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, plain[name], truth[name])
        if tensor.shape[0] == EXPERTS and name.startswith("d") and op is not route:
            assert not tensor[1].any(), f"{name} of an expert without tiles"


@every_dtype
@every_op
def test_two_runs_are_bitwise_equal(op: Callable, dtype: torch.dtype, backend: str) -> None:
    got, again = (run(op, "so400m", backend, dtype, dtype) for _ in range(2))
    assert_equal(again, got)


@every_dtype
@every_op
def test_no_choice_of_kernel_changes_a_bit(
    op: Callable, dtype: torch.dtype, backend: str, monkeypatch
) -> None:
    """Triton: with tensor maps and without. CUDA: large blocks and small ones."""
    if backend == "cuda":
        with _configs.forced("large"):
            got = run(op, "so400m", backend, dtype, dtype)
        with _configs.forced("small"):
            assert_equal(run(op, "so400m", backend, dtype, dtype), got)
        return
    got = run(op, "so400m", backend, dtype, dtype)
    monkeypatch.setenv("MIXPERT_TMA", "0")
    assert_equal(run(op, "so400m", backend, dtype, dtype), got)


@every_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [{}, {"image_of_tile": (0, 0, 1, 1, 1), "base_tile": (1, 4)}])
@torch.no_grad()
def test_one_launch_is_bitwise_the_three(
    images: dict, size: str, dtype: torch.dtype, backend: str
) -> None:
    tokens, depth, width = SIZES[size]
    new, images = Leaves(dtype, dtype), {name: ids(*v) for name, v in images.items()}
    x, weights = new("x", len(EXPERT), tokens, depth), router(new, depth, 16)
    gain, offset = new("gain", EXPERTS, depth), new("offset", EXPERTS, depth)
    weight, bias = new("w", EXPERTS, width, depth, std=depth**-0.5), new("b", EXPERTS, width)
    given, options = (weights, ops.Strategy("direct")), {"backend": backend}
    for _ in range(20):  # programs meet in another order every time
        y, fused = ops.route_grouped_linear(
            x, *given, gain, offset, weight, bias, **images, **options
        )
        want = ops.route(x, *given, **images, **options)
        for got, part in zip(fused, want, strict=True):
            assert torch.equal(got, part)
        h = ops.grouped_layer_norm(x, gain, offset, want, **options)
        z = ops.grouped_linear(h, weight, bias, want, **options)
        assert torch.equal(y, z)
        one = (gain, offset, weight, bias)
        assert torch.equal(ops.norm_grouped_linear(x, *one, want, **options), z)
        for b in range(len(EXPERT)):  # less than one wave of blocks
            alone = Routing.forced(want.expert[b : b + 1], EXPERTS)
            part = ops.norm_grouped_linear(x[b : b + 1], *one, alone, **options)
            assert torch.equal(part[0], z[b])


@torch.no_grad()
def test_offsets_past_32_bits(backend: str) -> None:
    batch, tokens, width = 700, 729, 4304  # 2.2e9 outputs
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    options = {"backend": backend}
    x = torch.randn(batch, tokens, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(EXPERTS, width, 16, device=DEVICE, dtype=torch.bfloat16)
    y = ops.grouped_linear(x, weight, None, routing(*[b % 3 for b in range(batch)]), **options)
    for b in (0, batch // 2, batch - 1):
        alone = ops.grouped_linear(x[b : b + 1], weight, None, routing(b % 3), **options)
        assert torch.equal(y[b], alone[0])
    back = torch.randn(EXPERTS, 16, width, device=DEVICE, dtype=torch.bfloat16)
    z = ops.grouped_linear(y, back, None, routing(*[b % 3 for b in range(batch)]), **options)
    last = ops.grouped_linear(y[-1:], back, None, routing((batch - 1) % 3), **options)
    assert torch.equal(z[-1], last[0])
