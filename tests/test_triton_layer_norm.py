"""The Triton grouped_layer_norm, interpreted: widths, bits, launches, addresses. More of it is in tests/compiled."""

from __future__ import annotations

import mmap

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends import why_not
from mixpert_kernels.backends.reference import grouped_layer_norm as plain
from mixpert_kernels.testing import assert_as_accurate

REASON = why_not("grouped_layer_norm", "triton", device="cpu", dtype=torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from mixpert_kernels.backends.triton import _launch, _rows  # noqa: E402
from mixpert_kernels.backends.triton import grouped_layer_norm as norm  # noqa: E402

EXPERT = [2, 0, 2, 3, 0]  # none for expert 1
EXPERTS = 4
NORESERVE = 0x4000  # Linux: address space without memory behind it, until it is written


def problem(tokens, width, dtype, *, centre=0.0):
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(width)
    rows, table = (len(EXPERT), tokens, width), (EXPERTS, width)
    shapes = (rows, table, table, rows)
    x, *rest = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype) for t in (x + centre, *rest)]


def run(backend, tensors, expert=EXPERT, eps=1e-6):
    """Every output of the forward and the backward pass, by name."""
    x, weight, bias, dy = tensors
    ids = Routing.forced(torch.tensor(expert, dtype=torch.int32), EXPERTS).ids
    y, mean, rstd = backend.grouped_layer_norm(x, weight, bias, *ids, eps)
    grads = backend.grouped_layer_norm_backward(dy, x, weight, bias, mean, rstd, *ids)
    names = ("y", "dx", "dweight", "dbias", "mean", "rstd")
    return dict(zip(names, (y, *grads, mean, rstd), strict=True))


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, in order."""
    names, launch = [], _launch.launch

    def count(kernel, grid, args, config):
        names.append(kernel.fn.__name__)
        launch(kernel, grid, args, config)

    monkeypatch.setattr(_launch, "launch", count)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tokens, width",
    [(65, 1), (35, 9), (37, 72), (2, 1001), (3, 1152), (1, 4304)],
)
def test_widths(tokens, width, dtype):
    x, weight, bias, dy = problem(tokens, width, dtype, centre=3.0)
    few = slice(None if width < 100 else 2)
    tensors = [x[few], weight, bias, dy[few]]
    got, usual, truth = (
        run(*call, EXPERT[few])
        for call in ((norm, tensors), (plain, tensors), (plain, [t.double() for t in tensors]))
    )
    for name in ("y", "dx", "dweight", "dbias"):
        if width == 1 and name == "dx":
            assert got[name].eq(0).all()
        else:
            assert_as_accurate(name, got[name], usual[name], truth[name])
    for name in ("mean", "rstd"):
        assert got[name].dtype == torch.float32 and got[name].shape == usual[name].shape
        torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens, width", [(33, 72), (2, 73)])
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(tokens, width):
    x, weight, bias, dy = problem(tokens, width, torch.float16)
    whole = run(norm, (x, weight, bias, dy))
    for tiles in ([3], [4, 2, 0, 3, 1], [1, 4]):
        part = run(norm, (x[tiles], weight, bias, dy[tiles]), [EXPERT[b] for b in tiles])
        for name in ("y", "dx", "mean", "rstd"):
            assert torch.equal(part[name], whole[name][tiles]), name
    for name in ("dweight", "dbias"):  # the last part held all tiles of expert 0
        assert torch.equal(part[name][0], whole[name][0]), name
        assert part[name][1:].eq(0).all()


@pytest.mark.parametrize("expert", [[0] * 5, [3, 2, 1, 0, 1]])
def test_launches_do_not_depend_on_the_mix(launched, expert):
    run(norm, problem(9, 72, torch.float32), expert)
    kernel, backward, *sums = launched
    assert kernel == "_grouped_layer_norm_kernel"
    assert backward == "_grouped_layer_norm_backward_kernel"
    assert len(sums) == 2 and len(set(sums)) == 1


def test_without_a_bias_nothing_is_made_for_it(launched):
    x, weight, _, dy = problem(9, 72, torch.float32)
    got = run(norm, (x, weight, None, dy))
    assert got["dbias"].numel() == 0 and len(launched) == 3
    wanted = run(norm, (x, weight, torch.zeros_like(weight), dy))
    assert all(torch.equal(got[name], wanted[name]) for name in ("y", "dx", "dweight"))


def test_empty_batches_and_tiles():
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.randn(shape)
        got = run(norm, (x, torch.ones(4, 8), torch.ones(4, 8), x), [1] * shape[0])
        assert got["y"].shape == got["dx"].shape == shape
        assert got["dweight"].eq(0).all() and got["dbias"].eq(0).all()


def test_aligned_rows_copies_only_what_it_must():
    x = torch.randn(6, 9, 160)
    for view in (x, x[2:], x[:, 1:], x[..., 32:64], x[:1].expand(6, 9, 160)):
        assert _rows.aligned_rows(view) is view
    for view in (x.transpose(1, 2), x[..., 1:65], x[:, :1, :1].expand(6, 9, 160)):
        copy = _rows.aligned_rows(view)
        assert copy.is_contiguous() and torch.equal(copy, view)
    odd = torch.randn(6, 9, 73)[1:]
    assert _rows.aligned_rows(odd) is odd


def test_offsets_beyond_32_bits():
    """Three small tiles, 2**30 elements apart."""
    x, weight, bias, dy = problem(5, 72, torch.float16)
    stride = 2**30 + 8
    room = mmap.mmap(-1, 2 * (2 * stride + x[0].numel()),
                     flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)  # fmt: skip
    spread = torch.frombuffer(room, dtype=torch.float16).as_strided((3, 5, 72), (stride, 72, 1))
    spread.copy_(x[:3])
    far = run(norm, (spread, weight, bias, dy[:3]), EXPERT[:3])
    near = run(norm, (x[:3], weight, bias, dy[:3]), EXPERT[:3])
    assert all(torch.equal(far[name], near[name]) for name in far)
    spread.copy_(dy[:3])
    far = run(norm, (x[:3], weight, bias, spread), EXPERT[:3])
    assert all(torch.equal(far[name], near[name]) for name in far)
