"""The parts of grouped_linear's backward by Triton: weight gradients, dz with its column sums, and sums by expert."""

from __future__ import annotations

import inspect
import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from mixpert_kernels import Routing  # noqa: E402
from mixpert_kernels.backends import why_not  # noqa: E402
from mixpert_kernels.backends.reference import grouped_linear as definition  # noqa: E402
from mixpert_kernels.backends.triton import _configs, _launch, grouped_linear  # noqa: E402
from mixpert_kernels.backends.triton._reduce import backward_parts, sum_by_expert  # noqa: E402
from mixpert_kernels.backends.triton.grouped_outer import grouped_outer  # noqa: E402
from mixpert_kernels.testing import assert_as_accurate  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if why_not("grouped_linear", "triton", device=DEVICE, dtype=dtype) is None
]
ACTIVATIONS = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
}
EXPERT = torch.tensor([2, 0, 2, 2, 0])  # of 4 experts: 1 and 3 have no tile
EXPERTS = 4
SIZES = ((17, 136, (72,)), (70, 72, (40, 8, 136)), (1, 1, (1,)), (64, 3, (5, 9, 2, 1)))  # T, K, N

pytestmark = pytest.mark.skipif(not DTYPES, reason="Triton's kernels cannot run here")


@pytest.fixture(params=["pointers", "tma"])
def path(request, monkeypatch):
    """The way operands come: both run on a CPU, where the interpreter of Triton 3.7 and later has descriptors."""
    if request.param == "pointers":
        monkeypatch.setenv("MIXPERT_TMA", "0")
    elif DEVICE.type == "cpu":
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            pytest.skip("this Triton does not interpret tensor descriptors")
        monkeypatch.setattr(_configs, "chip", lambda device: _configs.nvidia(90))
    elif not _configs.chip(DEVICE).has_tma:
        pytest.skip("this GPU has no tensor memory accelerator")
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far."""
    names, launch = [], _launch.launch

    def record(kernel, grid, args, config):
        names.append(kernel.__name__)
        launch(kernel, grid, args, config)

    monkeypatch.setattr(_launch, "launch", record)
    return names


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def outer(dz, x, widths, expert=EXPERT, dtype=None, **out):
    routing = Routing.forced(expert.to(DEVICE), EXPERTS)
    dtype = dtype or x.dtype
    return grouped_outer(dz, x, widths, routing.order, routing.offsets, EXPERTS, dtype, **out)


def by_expert(parts, expert=EXPERT, dtype=torch.float32):
    routing = Routing.forced(expert.to(DEVICE), EXPERTS)
    return sum_by_expert(parts, routing.order, routing.offsets, EXPERTS, dtype)


def activation_backward(dy, *rest):
    """dz, the parts of the sum for bias and those of the sum for scale."""
    (dz, parts), width = backward_parts(dy, *rest), dy.shape[2]
    needs_bias, needs_scale = rest[-2:]
    dbias = parts[..., :width] if needs_bias else None
    return dz, dbias, parts[..., -width:] if needs_scale else None


def plain_outer(dz, x, widths, dtype):
    """By autograd, one tile at a time."""
    weights = [torch.zeros(EXPERTS, n, x.shape[2], dtype=dtype, device=DEVICE) for n in widths]
    for w in weights:
        w.requires_grad_()
    dz, x = dz.to(dtype), x.to(dtype)
    rows = [[F.linear(x_b, w[e]) for w in weights] for x_b, e in zip(x, EXPERT, strict=True)]
    z = torch.stack([torch.cat(row, -1) for row in rows])
    return torch.autograd.grad(z, weights, dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outer_is_as_accurate_as_plain_pytorch(sizes, dtype, path):
    tokens, depth, widths = sizes
    dz = normal(5, tokens, sum(widths), dtype=dtype)
    x = normal(5, tokens, depth, dtype=dtype, seed=1)
    got = outer(dz, x, list(widths))
    plain, truth = (plain_outer(dz, x, widths, d) for d in (dtype, torch.float64))
    for i, tensors in enumerate(zip(got, plain, truth, strict=True)):
        assert_as_accurate(f"dw{i}", *tensors)
        assert tensors[0][[1, 3]].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_of_an_expert_is_bitwise_that_of_its_own_tiles(dtype, path):
    dz, x = normal(5, 70, 136, dtype=dtype), normal(5, 70, 72, dtype=dtype, seed=1)
    (together,) = outer(dz, x, [136])
    assert torch.equal(outer(dz, x, [136])[0], together)
    order = [1, 0, 4, 2, 3]  # the tiles of an expert stay in order
    assert torch.equal(outer(dz[order], x[order], [136], EXPERT[order])[0], together)
    for e in (0, 2):
        own = e == EXPERT
        (alone,) = outer(dz[own], x[own], [136], EXPERT[own])
        assert torch.equal(alone[e], together[e])
        assert alone[[i for i in range(EXPERTS) if i != e]].eq(0).all()


def test_outer_without_any_tile_is_zero(path):
    (dw,) = outer(normal(0, 5, 8), normal(0, 5, 16), [8], EXPERT[:0])
    assert dw.shape == (EXPERTS, 8, 16)
    assert dw.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_adds_to_main_gradients(dtype, path):
    widths = [40, 8, 136]
    dz, x = normal(5, 70, 184, dtype=dtype), normal(5, 70, 72, dtype=dtype, seed=1)
    fresh = outer(dz, x, widths, dtype=torch.float32)
    main = [normal(EXPERTS, width, 72, seed=2) for width in widths]
    before = [m.clone() for m in main]
    got = outer(dz, x, widths, out=main, accumulate=True)
    for m, g, b, f in zip(main, got, before, fresh, strict=True):
        assert g is m
        assert torch.equal(m, b + f)
        assert torch.equal(m[[1, 3]], b[[1, 3]])
    outer(dz, x, widths, out=main)
    for m, f in zip(main, fresh, strict=True):
        assert torch.equal(m, f)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_a_tile_is_read(dtype, path):
    def surrounded(t):
        around = torch.full((6, t.shape[1] + 3, t.shape[2] + 16), float("nan"), dtype=dtype)
        view = around.to(DEVICE)[:5, : t.shape[1], : t.shape[2]]
        return view.copy_(t)

    dz, x = normal(5, 70, 136, dtype=dtype), normal(5, 70, 72, dtype=dtype, seed=1)
    (wanted,) = outer(dz, x, [136])
    assert torch.equal(outer(surrounded(dz), surrounded(x), [136])[0], wanted)
    got = activation_backward(surrounded(dz), dz, None, None, "gelu", True, True)
    for g, w in zip(got, activation_backward(dz, dz, None, None, "gelu", True, True), strict=True):
        assert torch.equal(g, w)


def test_a_tile_with_nan_spoils_its_own_expert_only(path):
    dz, x = normal(5, 70, 136), normal(5, 70, 72, seed=1)
    (before,) = outer(dz, x, [136])
    x[0, -1], dz[3, -1] = float("nan"), float("inf")  # both of expert 2
    (after,) = outer(dz, x, [136])
    assert not after[2].isfinite().any()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_memory_layout_does_not_matter(path):
    dz, x = normal(136, 70, 5).permute(2, 1, 0), normal(70, 5, 72, seed=1).transpose(0, 1)
    assert torch.equal(outer(dz, x, [136])[0], outer(dz.contiguous(), x.contiguous(), [136])[0])
    ones = torch.ones((), device=DEVICE).expand(5, 70, 136)
    assert torch.equal(outer(ones, x, [136])[0], outer(ones.contiguous(), x, [136])[0])
    _, bias, _ = activation_backward(ones, None, None, None, "none", True, False)
    assert by_expert(bias)[:, 0].tolist() == [140, 0, 210, 0]


def sparse(tensor, *strides):
    """The same tensor in memory of which only the pages that hold it exist."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, span * tensor.element_size(), flags=flags)
    whole = torch.frombuffer(memory, dtype=tensor.dtype)
    return whole.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's memory is not lazy")
@pytest.mark.parametrize("strides", [(2**31 + 64, 64), (64, 2**28)], ids=["tile", "token"])
def test_offsets_have_64_bits(strides):
    dtype = torch.float16
    dz, x = normal(3, 17, 40, dtype=dtype), normal(3, 17, 24, dtype=dtype, seed=1)
    expert, scale = torch.tensor([1, 0, 1]), normal(EXPERTS, 40, dtype=dtype)
    far_dz, far_x = sparse(dz, *strides, 1), sparse(x, *strides, 1)
    assert torch.equal(outer(far_dz, far_x, [40], expert)[0], outer(dz, x, [40], expert)[0])
    rest = (scale, expert.int(), "gelu", True, True)
    got = activation_backward(far_dz, far_dz, *rest)
    for g, wanted in zip(got, activation_backward(dz, dz, *rest), strict=True):
        assert torch.equal(g, wanted)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "activation, sizes", [*((name, (70, 40)) for name in ACTIVATIONS), ("gelu", (17, 136))], ids=str
)
def test_activation_backward_is_as_accurate_as_plain_pytorch(sizes, dtype, activation, scaled):
    dy, pre = normal(5, *sizes, dtype=dtype), 2 * normal(5, *sizes, dtype=dtype, seed=1)
    scale = normal(EXPERTS, sizes[1], dtype=dtype, seed=2) if scaled else None
    expert = EXPERT.int().to(DEVICE)

    def plain(dtype):
        z = pre.to(dtype).requires_grad_()
        s = normal(EXPERTS, sizes[1]) if scale is None else scale
        s = (s if scaled else torch.ones_like(s)).to(dtype).requires_grad_()
        zero = torch.zeros(EXPERTS, sizes[1], dtype=dtype, device=DEVICE, requires_grad=True)
        rows = zip(z, EXPERT, strict=True)
        y = torch.stack([s[e] * ACTIVATIONS[activation](row + zero[e]) for row, e in rows])
        return torch.autograd.grad(y, [z, zero, s], dy.to(dtype))

    dz, *parts = activation_backward(dy, pre, scale, expert, activation, True, True)
    got = (dz, *(by_expert(p, dtype=dtype) for p in parts))
    for i, each in enumerate(zip(got, plain(dtype), plain(torch.float64), strict=True)):
        assert_as_accurate(("dz", "dbias", "dscale")[i], *each)
    assert (dz is dy) == (activation == "none" and not scaled)
    for sums in got[1:]:
        assert sums[[1, 3]].eq(0).all()


@pytest.mark.parametrize("columns", [1, 40])
def test_sums_by_expert_are_bitwise_those_of_an_experts_own_tiles(columns):
    # 84 rows for expert 3, of which 64 are added at a time
    expert = torch.tensor([3, 0, 1, 3] * 14)
    parts = normal(56, 3, columns)
    got = by_expert(parts, expert)
    assert torch.equal(by_expert(parts, expert), got)
    assert got[2].eq(0).all()
    wanted = torch.stack([parts[expert == e].sum((0, 1)) for e in range(EXPERTS)])
    truth = torch.stack([parts[expert == e].double().sum((0, 1)) for e in range(EXPERTS)])
    assert_as_accurate("sums", got, wanted, truth)
    for e in (0, 1, 3):
        own = expert == e
        assert torch.equal(by_expert(parts[own], expert[own])[e], got[e])
    wide = torch.full((56, 3, columns + 7), float("nan"), device=DEVICE)
    wide[..., 3:-4] = parts
    assert torch.equal(by_expert(wide[..., 3:-4], expert), got)


def backward(module, tensors, needs, activation="gelu", widths=(8, 24)):
    dy, x, weight, bias, pre, scale = tensors
    weights, biases = (list(t.split(widths, 1)) for t in (weight, bias))
    routing = Routing.forced(EXPERT.to(DEVICE), EXPERTS).ids
    return module.grouped_linear_backward(
        dy, x, weights, biases, pre, *routing, activation, scale, needs
    )


def layer(dtype):
    shapes = (
        (5, 17, 32),
        (5, 17, 24),
        (EXPERTS, 32, 24),
        (EXPERTS, 32),
        (5, 17, 32),
        (EXPERTS, 32),
    )
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def test_the_host_function_has_the_signature_of_the_reference():
    names = [
        list(inspect.signature(module.grouped_linear_backward).parameters)
        for module in (grouped_linear, definition)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "needs, dtype",
    [*((needs, torch.float32) for needs in itertools.product([False, True], repeat=4))]
    + [((True,) * 4, dtype) for dtype in DTYPES[1:]],
    ids=str,
)
def test_backward_gives_what_is_needed_and_launches_nothing_else(needs, dtype, launched):
    tensors = layer(dtype)
    got = backward(grouped_linear, tensors, list(needs))
    plain = backward(definition, tensors, list(needs))
    truth = backward(definition, [t.double() for t in tensors], list(needs))
    flat = ([r[0], *r[1], *r[2], r[3]] for r in (got, plain, truth))
    for i, each in enumerate(zip(*flat, strict=True)):
        assert each[0].is_contiguous()
        assert_as_accurate(f"gradient {i}", *each)
    needs_x, needs_weight, needs_bias, needs_scale = needs
    wanted = ["_activation_backward_kernel"] if any(needs) else []
    wanted += ["_sum_by_expert_kernel"] * (needs_bias or needs_scale)
    wanted += ["_linear_dx_kernel"] * needs_x + ["_grouped_outer_kernel"] * needs_weight
    assert launched == wanted


def test_issued_products_at_729_tokens():
    """Rows are given for every chip; what they issue is the sizes of their blocks."""
    rows = {row for table in _configs.OUTER_ROWS.values() for row in table}
    layers = [(1152, 1152, 1.054), (4304, 1152, 1.066), (1152, 4304, 1.066)]
    for row, (n, k, most) in itertools.product(rows, layers):
        issued = 1.0
        for size, block in ((729, row.block_t), (n, row.block_n), (k, row.block_k)):
            issued *= triton.cdiv(size, block) * block / size
        assert issued <= most, row
