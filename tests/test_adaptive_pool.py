"""adaptive_pool: every backend, forward and gradient, against PyTorch's adaptive_avg_pool2d of each image."""

from __future__ import annotations

import functools

import _served
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels import Grids
from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.ops import adaptive_pool
from mixpert_kernels.testing import assert_as_accurate

HERE = [
    name
    for name in BACKENDS
    if why_not("adaptive_pool", name, device="cpu", dtype=torch.float32) is None
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((3, 5), (1, 40), (17, 2))
FEW = ((3, 5), (6, 6), (1, 9))
FAR = ((1, 2048), (45, 45))  # what a pool to 16 x 16 has to serve


skip_unless_served = functools.partial(_served.skip_unless_served, "adaptive_pool")


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(sizes, channels, bins, dtype=torch.float64):
    """x and dy."""
    rows = sum(h * w for h, w in sizes)
    dy = normal(len(sizes), bins[0] * bins[1], channels, seed=1, dtype=dtype)
    return normal(rows, channels, dtype=dtype), dy


def plain(x, sizes, bins):
    """PyTorch's own, image by image."""
    images = x.split([h * w for h, w in sizes])
    pooled = [
        F.adaptive_avg_pool2d(image.T.reshape(-1, h, w), bins).flatten(1).T
        for image, (h, w) in zip(images, sizes, strict=True)
    ]
    return torch.stack(pooled)


def call(x, sizes, bins, backend="auto"):
    grids = Grids.of(sizes)
    return adaptive_pool(x, grids, height=bins[0], width=bins[1], backend=backend)


def run(function, x, dy):
    """The output and the gradient of x."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


@pytest.mark.parametrize("backend", HERE)
def test_by_hand(backend):
    """Bins overlap in the row of 3 patches; the image of one patch is repeated."""
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]], requires_grad=True)
    y = call(x, [(1, 3), (1, 1)], (2, 2), backend)
    assert y.flatten().tolist() == [1.5, 3.0, 1.5, 3.0, 8.0, 8.0, 8.0, 8.0]
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[1.0, 2, 4, 8], [1, 1, 1, 1]])[..., None])
    assert dx.flatten().tolist() == [2.5, 7.5, 5.0, 4.0]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_equals_the_rule(sizes, height, width):
    """The bins of SPEC 2.1, in NumPy."""
    x, _ = problem(sizes, 2, (height, width))
    wanted, begin = np.empty((len(sizes), height * width, 2)), 0
    for b, (h, w) in enumerate(sizes):
        image = x[begin : begin + h * w].numpy().reshape(h, w, 2)
        begin += h * w
        for i, j in np.ndindex(height, width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            wanted[b, i * width + j] = image[rows, columns].mean((0, 1))
    np.testing.assert_allclose(call(x, sizes, (height, width)).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("bins, channels", [((16, 16), 8), ((1, 1), 8), ((3, 7), 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, bins, channels):
    skip_unless_served(backend, dtype)
    x, dy = problem(SIZES, channels, bins, dtype)
    got = run(lambda x: call(x, SIZES, bins, backend), x, dy)
    ours = run(lambda x: plain(x, SIZES, bins), x, dy)
    exact = run(lambda x: plain(x, SIZES, bins), x.double(), dy.double())
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, ours[name], exact[name])


@pytest.mark.parametrize("backend", HERE)
def test_equals_pytorch_from_one_row_to_a_square(backend):
    bins = (
        (4, 16) if backend == "triton" else (16, 16)
    )  # the interpreter is slow; it is emulated at 16 x 16
    x, dy = problem(FAR, 4, bins, torch.float32)
    got = run(lambda x: call(x, FAR, bins, backend), x, dy)
    exact = run(lambda x: plain(x, FAR, bins), x.double(), dy.double())
    for name, wanted in exact.items():
        error = (got[name] - wanted).norm() / wanted.norm()
        assert error < 1e-5, (name, error)


def test_float32_sums_of_half_precision():
    """2048 + 1 is 2048 in float16."""
    x = torch.ones(4097, 1, dtype=torch.float16)
    x[0] = 4096
    assert call(x, [(1, 4097)], (1, 1), "reference").item() == 2.0
    dy = torch.ones(1, 4097, 1, dtype=torch.float16)
    dy[0, 0] = 2048
    dx = run(lambda x: call(x, [(1, 1)], (1, 4097), "reference"), x[:1], dy)["dx"]
    assert dx.item() == 2048 + 4096


def test_offsets_have_64_bits():
    if reason := why_not("adaptive_pool", "triton", device="cpu", dtype=torch.float16):
        pytest.skip(reason)
    x = normal(15, 8, dtype=torch.float16)
    memory = torch.from_numpy(
        np.empty(14 * 2**28 + 8, np.float16)
    )  # what nobody touches is never there
    far = memory.as_strided(x.shape, (2**28, 1)).copy_(x)
    assert torch.equal(call(far, [(3, 5)], (2, 2), "triton"), call(x, [(3, 5)], (2, 2), "triton"))


def test_gradcheck():
    x, _ = problem([(2, 3), (1, 5), (4, 1)], 2, (2, 3))
    function = lambda x: call(x, [(2, 3), (1, 5), (4, 1)], (2, 3))  # noqa: E731
    assert torch.autograd.gradcheck(function, x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(needs_gradient, dtype, backend):
    skip_unless_served(backend, dtype)
    x, dy = problem([(2, 3), (1, 4)], 8, (2, 2), dtype)
    grids = Grids.of([(2, 3), (1, 4)])
    args = (x.requires_grad_(needs_gradient), *grids, 2, 2, backend)
    torch.library.opcheck(torch.ops.mixpert.adaptive_pool.default, args)
    torch.library.opcheck(
        torch.ops.mixpert.adaptive_pool_backward.default,
        (dy, *grids, 10, 2, 2, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_double_backward_says_that_there_is_none():
    x, _ = problem([(2, 3)], 2, (2, 2))
    y = call(x.requires_grad_(), [(2, 3)], (2, 2))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adaptive_pool: double backward is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("backend", HERE)
def test_an_image_is_bitwise_the_same_in_any_batch_and_order(backend, channels, dtype):
    skip_unless_served(backend, dtype)
    x, dy = problem(FEW, channels, (5, 4), dtype)
    images = x.split([h * w for h, w in FEW])

    def on(order):
        sizes = [FEW[b] for b in order]
        x = torch.cat([images[b] for b in order])
        got = run(lambda x: call(x, sizes, (5, 4), backend), x, dy[order])
        return zip(got["y"], got["dx"].split([h * w for h, w in sizes]), strict=True)

    whole = list(on(range(len(FEW))))
    for order in ([0], [2], [1, 2, 0]):
        for b, (y, dx) in zip(order, on(order), strict=True):
            assert torch.equal(y, whole[b][0]) and torch.equal(dx, whole[b][1]), b


@pytest.mark.parametrize("backend", HERE)
def test_one_image_touches_no_other(backend):
    x, dy = problem([(3, 5), (2, 2), (7, 1)], 8, (4, 4), torch.float32)
    sizes = [(3, 5), (2, 2), (7, 1)]
    before = run(lambda x: call(x, sizes, (4, 4), backend), x, dy)
    x[15:19], dy[1] = float("nan"), float("nan")
    after = run(lambda x: call(x, sizes, (4, 4), backend), x, dy)
    assert after["y"][1].isnan().all() and after["dx"][15:19].isnan().all()
    assert torch.equal(after["y"][[0, 2]], before["y"][[0, 2]])
    for rows in (slice(15), slice(19, None)):
        assert torch.equal(after["dx"][rows], before["dx"][rows])


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    sizes = FEW
    x, dy = problem(sizes, 8, (4, 4), torch.float32)
    wanted = run(lambda x: call(x, sizes, (4, 4), backend), x, torch.ones_like(dy))
    beside = [
        F.pad(x, (n, 0))[:, n:] for n in (3, 8)
    ]  # rows begin at no multiple of 16 bytes, and at one
    for strided in (*beside, x.T.contiguous().T):
        leaf = strided.detach().requires_grad_()
        y = call(leaf, sizes, (4, 4), backend)
        assert torch.equal(y, wanted["y"])
        dx = torch.autograd.grad(y, leaf, torch.ones(()).expand(dy.shape))[0]
        assert torch.equal(dx, wanted["dx"])


def test_compiles_as_one_graph_for_every_batch():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def function(x, sizes, cu_seqlens):
        return adaptive_pool(x, Grids(sizes, cu_seqlens), height=7, width=5).sin()

    for sizes in (SIZES, FEW + SIZES, SIZES[1:]):
        x = problem(sizes, 8, (7, 5), torch.float32)[0].requires_grad_()
        y, wanted = function(x, *Grids.of(sizes)), call(x, sizes, (7, 5)).sin()
        torch.testing.assert_close(y, wanted)
        (got,), (grad,) = (torch.autograd.grad(z.sum(), x) for z in (y, wanted))
        torch.testing.assert_close(got, grad)
    assert graphs.frame_count == 1


X, GRIDS = torch.zeros(10, 4), Grids.of([(2, 3), (1, 4)])


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((X.int(), GRIDS), {}, "x must be a floating-point tensor, got torch.int32"),
        ((X[None], GRIDS), {}, r"x must have shape \(R, C\), got \(1, 10, 4\)"),
        ((X[:9], GRIDS), {}, "grids.cu_seqlens must ascend from 0 to the 9 rows of x"),
        (
            (X, Grids(GRIDS.sizes.flip(1) + 1, GRIDS[1])),
            {},
            r"grids must have as many rows an image as H \* W",
        ),
        ((X, GRIDS.sizes), {}, "grids must be Grids, got Tensor"),
        ((X, GRIDS), {"height": 0}, "height must be at least 1, got 0"),
        ((X, GRIDS), {"width": -1}, "width must be at least 1, got -1"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=f"adaptive_pool: {message}"):
        adaptive_pool(*args, **options)
