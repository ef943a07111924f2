"""grouped_linear by Triton, interpreted: what only this backend has. test_grouped_linear.py has what all have."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixpert_kernels.backends import why_not
from mixpert_kernels.backends.triton import _configs, _configs_gemm, _dx, _launch, grouped_linear
from mixpert_kernels.testing import assert_as_accurate

EXPERT = torch.tensor([2, 0, 2, 1], dtype=torch.int32)  # expert 3 has no tile
ORDER = torch.tensor([1, 3, 0, 2], dtype=torch.int32)
OFFSETS = torch.tensor([0, 1, 2, 4, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def interpreted():
    reason = why_not("grouped_linear", "triton", device="cpu", dtype=torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def launches(monkeypatch):
    """The launches so far: (kernel's arguments, config)."""
    seen, launch = [], _launch.launch

    def record(kernel, grid, args, config):
        seen.append((args, config, grid))
        launch(kernel, grid, args, config)

    monkeypatch.setattr(_launch, "launch", record)
    return seen


@pytest.fixture
def tma(monkeypatch):
    """A chip with tensor descriptors, and float32 products that may use them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter, "TensorDescriptor"):
        pytest.skip("this Triton's interpreter takes no tensor descriptors from the host")
    monkeypatch.setattr(_configs, "chip", lambda device: _configs.nvidia(90, 4))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def problem(count, dtype, tokens=17, depth=72, width=136, seed=0):
    """x, weights, biases, residual, scale."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, tokens, depth), *[(4, width, depth)] * count, *[(4, width)] * count]
    shapes += [(4, tokens, count * width), (4, count * width)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return tensors[0], tensors[1 : 1 + count], tensors[1 + count : 1 + 2 * count], *tensors[-2:]


def forward(x, weights, biases, residual=None, scale=None, activation="gelu", keep=True):
    return grouped_linear.grouped_linear(
        x, weights, biases, EXPERT, ORDER, OFFSETS, None, activation, residual, scale, keep
    )


def dx_by_plain_pytorch(dz, weights, pre):
    g = torch.stack([t @ torch.cat(weights, 1)[e] for t, e in zip(dz, EXPERT, strict=True)])
    if pre is None:
        return g, None
    pre = pre.detach().requires_grad_()
    h = torch.nn.functional.gelu(pre, approximate="tanh")
    return torch.autograd.grad(h, pre, g)[0], h.detach()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_descriptors_and_a_persistent_grid_give_bitwise_what_pointers_give(
    tma, launches, monkeypatch, dtype, count
):
    x, weights, biases, residual, scale = problem(count, dtype)
    got = forward(x, weights, biases, residual, scale)
    dz = residual[..., : 136 * (count if count < 3 else 1)]
    got += _dx.linear_dx(dz, weights[: dz.shape[2] // 136], EXPERT, ORDER, "gelu", x)
    assert [config.tma for _, config, _ in launches] == [True, count != 2]
    monkeypatch.setenv("MIXPERT_TMA", "0")
    wanted = forward(x, weights, biases, residual, scale)
    wanted += _dx.linear_dx(dz, weights[: dz.shape[2] // 136], EXPERT, ORDER, "gelu", x)
    assert not any(config.tma for _, config, _ in launches[2:])
    row = dataclasses.replace(launches[-2][1], group=3, programs_per_multiprocessor=1)
    monkeypatch.setattr(_configs, "gemm_rows", lambda *_: [row])
    wanted += forward(x, weights, biases, residual, scale)
    assert launches[-1][2] == (4,)
    for a, b in zip(got + got[:2], wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("widths", [(136,), (64, 64, 64), (72, 40), (16,) * 4], ids=str)
@pytest.mark.parametrize("with_pre", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["pointers", "tma"])
def test_dx_is_as_accurate_as_plain_pytorch(request, path, dtype, with_pre, widths):
    if path == "tma":
        request.getfixturevalue("tma")
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(4, n, 72, generator=generator).to(dtype) for n in widths]
    dz = torch.randn(4, 17, sum(widths), generator=generator).to(dtype)
    pre = torch.randn(4, 17, 72, generator=generator).to(dtype) if with_pre else None
    got = _dx.linear_dx(dz, weights, EXPERT, ORDER, "gelu_tanh" if with_pre else "none", pre)
    plain = dx_by_plain_pytorch(dz, weights, pre)
    exact = [w.double() for w in weights]
    truth = dx_by_plain_pytorch(dz.double(), exact, None if pre is None else pre.double())
    for name, *tensors in zip(("dx", "h"), got, plain, truth, strict=True):
        if tensors[0] is not None:
            assert_as_accurate(name, *tensors)
    assert (got[1] is None) == (pre is None)


def scattered(tensor, *strides):
    """A copy whose elements lie so far apart; memory nobody touches is never allocated."""
    places = [(n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)]
    memory = torch.from_numpy(np.empty(sum(places) + 1, np.float16))
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


FAR = 2**30 + 8  # fits in 32 bits, twice as much does not


@pytest.mark.parametrize("what", ["tiles", "tokens", "experts", "rows"])
def test_offsets_have_64_bits(what):
    x, weights, biases, residual, _ = problem(1, torch.float16, tokens=3, depth=8, width=3)
    far_x = {"tiles": (FAR, 8, 1), "tokens": (8, FAR, 1)}.get(what)
    far_w = {"experts": (FAR, 8, 1), "rows": (8, FAR, 1)}.get(what)
    x_there = scattered(x, *far_x) if far_x else x
    w_there = [scattered(weights[0], *far_w)] if far_w else weights
    assert torch.equal(forward(x_there, w_there, biases)[0], forward(x, weights, biases)[0])
    dz = residual
    dz_there = scattered(dz, FAR, 3, 1) if what == "tiles" else dz
    got, wanted = (
        _dx.linear_dx(*a, EXPERT, ORDER)[0] for a in ((dz_there, w_there), (dz, weights))
    )
    assert torch.equal(got, wanted)


def test_weights_of_one_shape_share_a_launch_and_none_is_copied(launches):
    x, _, biases, *_ = problem(3, torch.float32)
    fused = torch.randn(4, 3, 136, 72)
    forward(x, list(fused.unbind(1)), biases)
    ((args, _, _),) = launches
    assert [args[f"w{i}"].data_ptr() for i in range(3)] == [w.data_ptr() for w in fused.unbind(1)]
    weights = [torch.randn(4, n, 72) for n in (136, 40, 40)]
    y, _ = forward(x, weights, [])
    assert len(launches) == 3
    parts = [forward(x, [w], [])[0] for w in weights]
    assert torch.equal(y, torch.cat(parts, -1))


def test_nothing_is_timed_without_a_gpu(launches, monkeypatch):
    monkeypatch.setenv("MIXPERT_AUTOTUNE", "1")
    forward(*problem(1, torch.float16))
    assert len(launches) == 1


def test_rows_are_timed_once_for_a_shape_of_layer(monkeypatch):
    rows = _configs.gemm_rows(_configs.nvidia(90), torch.float16, lambda: True)
    timed = []

    def do_bench(run):
        run()
        return -len(timed)  # the last is the fastest

    monkeypatch.setenv("MIXPERT_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(_configs_gemm, "_fastest", {})
    for _ in range(3):
        assert _configs.fastest(("kernel", 136, 72), rows, timed.append) is rows[-1]
    assert timed == rows


@pytest.mark.parametrize("chip", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_issued_matrix_flops_of_the_shipped_rows(dtype, chip):
    for row in _configs.gemm_rows(_configs.nvidia(chip), dtype, lambda: True):
        for columns, depth, most in (
            (3 * 1152, 1152, 1.054),
            (1152, 1152, 1.054),
            (3584, 1152, 1.054),
            (3584, 3584, 1.054),
            (4304, 1152, 1.066),
            (1152, 4304, 1.066),
        ):
            issued = useful = 1
            for size, block in ((729, row.block_m), (columns, row.block_n), (depth, row.block_k)):
                issued, useful = issued * -(-size // block) * block, useful * size
            assert issued <= most * useful, (row, columns, depth)
