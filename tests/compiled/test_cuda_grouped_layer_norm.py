"""grouped_layer_norm of csrc/, compiled to PTX and emulated: accuracy, bits, and how full its loads and stores are."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels import Routing
from mixpert_kernels.backends.cuda import grouped_layer_norm as norm
from mixpert_kernels.backends.reference import grouped_layer_norm as plain
from mixpert_kernels.testing import assert_as_accurate

from ._emulate_cuda import emulated
from ._worker import full

EXPERT = [2, 0, 2, 3]  # none for expert 1
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def problem(tokens, width, dtype):
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(width)
    rows, table = (len(EXPERT), tokens, width), (4, width)
    return [torch.randn(s, generator=generator).to(dtype) for s in (rows, table, table, rows)]


def run(backend, tensors, expert=EXPERT, bias=True):
    x, weight, c, dy = tensors
    c = c if bias else None
    ids = Routing.forced(torch.tensor(expert), 4).ids
    y, mean, rstd = backend.grouped_layer_norm(x, weight, c, *ids, EPS)
    grads = backend.grouped_layer_norm_backward(dy, x, weight, c, mean, rstd, *ids)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y, *grads), strict=True))


# A warp a row, in two chunks; rows of any start; the widest that a warp keeps; a block a row, and several turns of it.
SIZES = [(35, 72), (9, 73), (5, 1152), (2, 2048), (2, 4304), (1, 8201)]
FEW = [
    (80, 35, 72, torch.bfloat16),
    (90, 35, 72, torch.bfloat16),
    (80, 9, 73, torch.float16),
    (80, 5, 1152, torch.float32),
    (80, 2, 4304, torch.bfloat16),
]
ALL = [(arch, *size, dtype) for arch in (80, 90) for size in SIZES for dtype in DTYPES]


@pytest.mark.parametrize(
    "arch, tokens, width, dtype", [pytest.param(*c, marks=() if c in FEW else full) for c in ALL]
)
def test_is_as_accurate_as_plain_pytorch(arch, tokens, width, dtype):
    tensors = problem(tokens, width, dtype)
    usual, truth = run(plain, tensors), run(plain, [t.double() for t in tensors])
    first = None
    for seed in range(3):
        with emulated(arch=arch, seed=seed) as launches:
            got = run(norm, tensors)
        assert len(launches) == 3, launches  # forward, rows and parts, sums
        first = first or got
        for name in got:
            assert torch.equal(got[name], first[name]), f"{name} differs with seed {seed}"
    for name in first:
        assert_as_accurate(name, first[name], usual[name], truth[name])
    assert not first["dweight"][1].any() and not first["dbias"][1].any(), "expert 1 has no tile"


@pytest.mark.parametrize("width", [72, 73])
def test_without_bias(width):
    tensors = problem(9, width, torch.bfloat16)
    with emulated():
        got = run(norm, tensors, bias=False)
    usual, truth = (
        run(plain, [t.to(d) for t in tensors], bias=False) for d in DTYPES[:1] + [torch.float64]
    )
    assert got.pop("dbias").numel() == 0
    for name in got:
        assert_as_accurate(name, got[name], usual[name], truth[name])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "width", [72, 73, pytest.param(1152, marks=full), pytest.param(2056, marks=full)]
)
def test_a_tile_is_bitwise_the_same_in_any_batch_and_order(width, arch):
    x, weight, bias, dy = problem(33, width, torch.bfloat16)
    with emulated(arch=arch):
        whole = run(norm, (x, weight, bias, dy))
    with emulated(arch=arch, seed=1):
        parts = {
            tuple(tiles): run(norm, (x[tiles], weight, bias, dy[tiles]), [EXPERT[b] for b in tiles])
            for tiles in ([3], [2, 0], [3, 1, 2, 0])
        }
    for tiles, part in parts.items():
        for name in ("y", "dx"):
            assert torch.equal(part[name], whole[name][list(tiles)]), (name, tiles)
    for name in ("dweight", "dbias"):
        assert torch.equal(parts[3,][name][3], whole[name][3]), (
            f"{name} of expert 3, who has one tile"
        )


@pytest.mark.parametrize("width", [72, 73])
def test_bits_do_not_depend_on_where_rows_lie(width):
    """Rows between others, starting at odd addresses, and a token's row where another's was."""
    tensors = problem(9, width, torch.bfloat16)
    with emulated():
        wanted = run(norm, tensors)
        wide = [torch.zeros(*t.shape[:-1], width + 9, dtype=t.dtype) for t in tensors]
        for w, t in zip(wide, tensors, strict=True):
            w[..., 3 : 3 + width] = t
        got = run(norm, [w[..., 3 : 3 + width] for w in wide])
        turned = run(norm, [t.flip(1) if t.dim() == 3 else t for t in tensors])
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
    for name in ("y", "dx"):
        assert torch.equal(turned[name].flip(1), wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1152, pytest.param(3200, marks=full)])
def test_loads_and_stores_fill_their_sectors(width, dtype):
    with emulated() as launches:
        run(norm, problem(5, width, dtype))
    for kernel, stats in launches[:2]:
        assert stats.load_efficiency >= 0.95, (kernel, stats.load_efficiency)
        assert stats.bank_conflicts == 0, (kernel, stats.bank_conflicts)
    kernel, stats = launches[0]
    assert stats.store_efficiency >= 0.95, (kernel, stats.store_efficiency)
