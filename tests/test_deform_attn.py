"""deform_attn: every backend, forward and all gradients, against grid_sample and transformers' Deformable-DETR."""

from __future__ import annotations

import functools

import _served
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from mixpert_kernels.backends import BACKENDS, why_not
from mixpert_kernels.grids import Grids
from mixpert_kernels.ops import deform_attn
from mixpert_kernels.testing import assert_as_accurate

HERE = [
    name
    for name in BACKENDS
    if why_not("deform_attn", name, device="cpu", dtype=torch.float32) is None
]
NAMES = ("value", "offsets", "logits", "reference")
RAGGED = [(3, 5), (1, 1), (7, 2), (1, 19), (16, 16)]


@pytest.fixture(params=["fixed order", "any order"])
def order(request):
    """How the gradient of value is added; the suite runs in PyTorch's deterministic mode, which asks for the first."""
    torch.use_deterministic_algorithms(request.param == "fixed order", warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(True, warn_only=True)


skip_unless_served = functools.partial(_served.skip_unless_served, "deform_attn")


def problem(sizes, *, queries=6, heads=2, points=3, d=8, dtype=torch.float64, seed=0):
    """value, offsets, logits, reference; a good part of the points lies outside the image."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, rows = len(sizes), sum(h * w for h, w in sizes)
    tensors = (
        normal(rows, heads, d),
        2 * normal(batch, queries, heads, points, 2),
        normal(batch, queries, heads, points),
        torch.rand(queries, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1,
    )
    return [t.to(dtype) for t in tensors]


def outer(batch, queries, heads, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, queries, heads * d, generator=generator, dtype=torch.float64).to(
        dtype
    )


def by_grid_sample(sizes, value, offsets, logits, reference):
    """The loop over images of the original, in the dtype of its arguments."""
    found, start = [], 0
    heads, d = value.shape[1:]
    for b, (height, width) in enumerate(sizes):
        image = value[start : start + height * width]  # (H W, heads, d)
        start += height * width
        place = reference[:, None, None] + offsets[b] / offsets.new_tensor([width, height])
        samples = F.grid_sample(
            image.permute(1, 2, 0).reshape(heads, d, height, width),
            (2 * place - 1).transpose(0, 1),  # (heads, Q, points, 2)
            padding_mode="zeros",
            align_corners=False,
        )  # (heads, d, Q, points)
        weights = logits[b].softmax(-1).transpose(0, 1)[:, None]  # (heads, 1, Q, points)
        found.append((samples * weights).sum(-1).permute(2, 0, 1).flatten(1))
    return torch.stack(found)


def run(function, tensors, dy):
    """The output and all gradients, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return {"y": y.detach()} | dict(zip(NAMES, torch.autograd.grad(y, leaves, dy), strict=True))


def ours(sizes, backend="auto", **options):
    grids = Grids.of(sizes)
    return lambda *tensors: deform_attn(*tensors, grids, backend=backend, **options)


def relative(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


def test_by_hand():
    value = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0]).view(5, 1, 1)
    grids = Grids.of([(2, 2), (1, 1)])
    reference = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.0, 0.5]])
    offsets = torch.zeros(2, 3, 1, 2, 2)
    offsets[:, 0, 0, 1] = torch.tensor([1.0, 0.0])  # of query 0 the second point, one patch right
    logits = torch.tensor([0.0, 3.0]).log().expand(2, 3, 1, 2)  # weights 0 and 1
    y = deform_attn(value, offsets, logits, reference, grids).view(2, 3)
    # Image 0: patch (0, 1); the mean of all; between the left column and nothing. Image 1, one patch:
    # 0.75 beyond its middle to the right and 0.25 above; its middle; half outside.
    wanted = [[3.0, 4.0, 1.5], [11 * 0.25 * 0.75, 11.0, 5.5]]
    torch.testing.assert_close(y, torch.tensor(wanted))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "sizes, d",
    [(RAGGED, 24), ([(1, 2048), (45, 45), (2048, 1), (9, 4)], 8)],
    ids=["small", "wide"],
)
def test_equals_the_loop_over_grid_sample(sizes, d, backend, order):
    """In float32 to 1e-5; the loop runs in float64, for in float32 its positions lose 1e-4 at 2048 patches."""
    shape = {"queries": 8, "heads": 2 if d == 24 else 1, "d": d}
    tensors = problem(sizes, points=2, dtype=torch.float32, **shape)
    dy = outer(len(sizes), dtype=torch.float32, **shape)
    got = run(ours(sizes, backend), tensors, dy)
    double = [t.double() for t in tensors]
    truth = run(lambda *t: by_grid_sample(sizes, *t), double, dy.double())
    assert tensors[1].abs().max() > 4 and truth["y"].eq(0).any()  # some queries see nothing
    # Interpreted, there is no fused multiply-add, and with it go the digits that it keeps.
    limit = 1e-4 if backend == "triton" and d == 8 else 1e-5
    for name in truth:
        assert relative(got[name], truth[name]) < limit, name


@pytest.mark.parametrize("backend", HERE)
def test_equals_deformable_detr_of_one_level(backend, order):
    """Of one size, as theirs must be; their reference is one for each image, ours is shared."""
    height, width, batch = 5, 7, 3
    sizes = [(height, width)] * batch
    tensors = problem(sizes, dtype=torch.float32)
    dy = outer(batch, 6, 2, 8, torch.float32)

    def theirs(value, offsets, logits, reference):
        extent = offsets.new_tensor([width, height])
        places = reference[None, :, None, None, None] + offsets[:, :, :, None] / extent
        return MultiScaleDeformableAttention()(
            value.view(batch, height * width, 2, 8),
            torch.tensor([[height, width]]),
            [(height, width)],
            torch.tensor([0]),
            places,
            logits.softmax(-1)[:, :, :, None],
            64,
        )

    got, wanted = run(ours(sizes, backend), tensors, dy), run(theirs, tensors, dy)
    for name in wanted:
        assert relative(got[name], wanted[name].double()) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_is_as_accurate_as_plain_pytorch(backend, dtype, order):
    """Half precision: as the loop in float32, its results rounded once."""
    skip_unless_served(backend, dtype)
    tensors = problem(RAGGED, dtype=dtype)
    dy = outer(len(RAGGED), 6, 2, 8, dtype)

    def loop(*given):
        return by_grid_sample(RAGGED, *given)

    got = run(ours(RAGGED, backend), tensors, dy)
    plain = run(loop, [t.float() for t in tensors], dy.float())
    exact = run(loop, [t.double() for t in tensors], dy.double())
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert_as_accurate(name, tensor, plain[name].to(dtype), exact[name])


@pytest.mark.parametrize("backend", HERE)
def test_value_may_be_a_slice_of_all_layers(backend):
    sizes = RAGGED[:3]
    value, *rest = problem(sizes, points=2, dtype=torch.float32)
    dy = outer(len(sizes), 6, 2, 8, torch.float32)
    wanted = run(ours(sizes, backend), (value, *rest), dy)
    layers = torch.randn(value.shape[0], 3, 2, 8).requires_grad_()  # rows 3 * C apart
    with torch.no_grad():
        layers[:, 1] = value
    y = ours(sizes, backend)(layers[:, 1], *rest)
    assert torch.equal(y, wanted["y"])
    (dlayers,) = torch.autograd.grad(y, layers, dy)
    assert torch.equal(dlayers[:, 1], wanted["value"]) and not dlayers[:, ::2].any()
    transposed = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ours(sizes, backend)(transposed, *rest), wanted["y"])


@pytest.mark.parametrize("backend", HERE)
def test_an_image_is_bitwise_the_same_alone_and_in_any_batch(backend):
    tensors = problem(RAGGED, dtype=torch.float32)
    value, offsets, logits, reference = tensors
    images = value.split([h * w for h, w in RAGGED])
    dy = outer(len(RAGGED), 6, 2, 8, torch.float32)

    def on(order):
        sizes = [RAGGED[b] for b in order]
        part = (torch.cat([images[b] for b in order]), offsets[order], logits[order], reference)
        return run(ours(sizes, backend, deterministic=True), part, dy[order])

    whole = on(list(range(len(RAGGED))))
    whole_dvalue = whole["value"].split([h * w for h, w in RAGGED])
    for order in ([3], [4, 2, 0]):
        part = on(order)
        dvalue = part["value"].split([RAGGED[b][0] * RAGGED[b][1] for b in order])
        for i, b in enumerate(order):
            for name in ("y", "offsets", "logits"):
                assert torch.equal(part[name][i], whole[name][b]), (name, order)
            assert torch.equal(dvalue[i], whole_dvalue[b]), order


@pytest.mark.parametrize("backend", HERE)
def test_what_lies_outside_is_not_read(backend):
    """Infinite rows of one image reach neither another image nor a point that does not touch them."""
    sizes = [(2, 2), (2, 2), (2, 2)]
    value, offsets, logits, _ = problem(sizes, dtype=torch.float32)
    value[:4] = value[8:] = float("inf")
    reference = torch.tensor(
        [[-3.0, 0.5], [0.5, 4.0], [0.25, 0.25], [0.0, 0.0], [1.0, 1.0], [2, 2]]
    )
    y = ours(sizes, backend)(value, offsets.clamp(-0.4, 0.4), logits, reference)
    assert y[1].isfinite().all()
    assert y[::2, [0, 1, 5]].eq(0).all() and not y[::2, 3].isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_large_logits_do_not_overflow(backend):
    value, offsets, logits, reference = problem([(3, 4)], dtype=torch.float32)
    y = ours([(3, 4)], backend)(value, offsets, 100 * logits, reference)
    wanted = by_grid_sample([(3, 4)], value, offsets, 100 * logits, reference)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("backend", HERE)
def test_a_point_between_two_blocks_of_patches_reaches_both(backend):
    """Of 40 lines of two patches the 33rd begins the second block of 64 rows; every point lies half in it."""
    sizes = [(40, 2)]
    value, offsets, logits, _ = problem(sizes, queries=3, dtype=torch.float32)
    reference = torch.tensor([[0.5, 32 / 40]]).expand(3, 2)
    dy = torch.ones(1, 3, 16)
    got = run(ours(sizes, backend, deterministic=True), (value, 0 * offsets, logits, reference), dy)
    lines = got["value"].view(
        40, 2, 2, 8
    )  # three queries, a quarter of each to each of four patches
    torch.testing.assert_close(lines[31:33], torch.full((2, 2, 2, 8), 0.75))
    assert not lines[:31].any() and not lines[33:].any()


def test_gradcheck():
    tensors = problem([(3, 4), (1, 1), (2, 1)], queries=2, d=3)
    place = tensors[3][:, None, None] * tensors[1].new_tensor([[4, 3], [1, 1], [1, 2]]).view(
        3, 1, 1, 1, 2
    )
    place = place + tensors[1] - 0.5
    kinks = (place - place.round()).abs() < 1e-3  # the offsets' gradient jumps at whole pixels
    tensors[1] = torch.where(kinks, tensors[1] + 0.01, tensors[1])
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours([(3, 4), (1, 1), (2, 1)]), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(dtype, backend):
    skip_unless_served(backend, dtype)
    sizes = [(2, 3), (1, 4)]
    grids = Grids.of(sizes)
    tensors = problem(sizes, queries=2, points=1, dtype=dtype)
    tensors = [t.requires_grad_() for t in tensors]
    op = torch.ops.mixpert
    torch.library.opcheck(op.deform_attn.default, (*tensors, *grids, True, backend))
    tensors = [t.detach() for t in tensors]
    dy = outer(2, 2, 2, 8, dtype)
    for needs in ([True] * 4, [False, True, False, False]):
        given = (dy, *tensors, *grids, True, needs, backend)
        torch.library.opcheck(
            op.deform_attn_backward.default, given, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("backend", HERE)
def test_only_the_gradients_asked_for_are_made(backend):
    sizes = RAGGED[:1]
    tensors = problem(sizes, points=1, dtype=torch.float32)
    dy = outer(1, 6, 2, 8, torch.float32)
    wanted = run(ours(sizes, backend, deterministic=True), tensors, dy)
    for i, name in enumerate(NAMES):
        given = list(tensors)
        given[i] = given[i].clone().requires_grad_()
        y = ours(sizes, backend, deterministic=True)(*given)
        assert torch.equal(torch.autograd.grad(y, given[i], dy)[0], wanted[name]), name


def test_a_second_gradient_is_refused():
    tensors = [t.requires_grad_() for t in problem([(2, 2)])]
    (dvalue,) = torch.autograd.grad(
        ours([(2, 2)])(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="deform_attn: double backward is not supported"):
        dvalue.sum().backward()


def test_half_precision_value_beside_float32_places():
    """What autocast makes of a layer: the projections in bfloat16, the reference a float32 parameter."""
    sizes = [(3, 4), (2, 2)]
    value, offsets, logits, reference = problem(sizes, dtype=torch.float32)
    leaves = [value.bfloat16(), offsets.bfloat16(), logits, reference]
    leaves = [t.requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(sizes)(*leaves)
    assert y.dtype == torch.bfloat16
    wanted = ours(sizes)(*(t.detach().float() for t in leaves))
    assert torch.equal(y, wanted.bfloat16())
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves)


def test_compiles_as_one_graph_for_every_batch():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def function(value, offsets, logits, reference, *grids):
        return deform_attn(value, offsets, logits, reference, Grids(*grids)).sin()

    for sizes in (RAGGED, RAGGED[:2], [(4, 9), (1, 3), (2, 2)]):
        tensors = problem(sizes, queries=9, dtype=torch.float32)  # 6 would be B + 1, at first
        tensors = [t.requires_grad_() for t in tensors]
        y = function(*tensors, *Grids.of(sizes))
        wanted = ours(sizes)(*tensors).sin()
        torch.testing.assert_close(y, wanted)
        got = torch.autograd.grad(y.sum(), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), tensors))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": lambda t: t[0]}, r"value must have shape \(R, heads, d\), got \(2, 8\)"),
        ({"value": lambda t: t.int()}, "value must be a floating-point tensor, got torch.int32"),
        ({"value": lambda t: t[:-1]}, "cu_seqlens must ascend from 0 to the 9 rows of value"),
        ({"offsets": lambda t: t[..., :1]}, r"offsets must have shape \(2, 6, 2, 3, 2\), got"),
        ({"offsets": lambda t: t.double()}, "offsets must be float64 exactly where value is"),
        ({"logits": lambda t: t[:1]}, r"logits must have shape \(2, Q, 2, points\), got \(1, 6"),
        ({"logits": lambda t: t[:, :, :1]}, r"logits must have shape \(2, Q, 2, points\), got"),
        ({"logits": lambda t: t.to("meta")}, "logits must be on the device of value, cpu, got meta"),
        ({"reference": lambda t: t[:-1]}, r"reference must have shape \(6, 2\), got \(5, 2\)"),
        ({"reference": lambda t: t.long()}, "reference must be a floating-point tensor, got"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    sizes = [(2, 3), (1, 4)]
    tensors = dict(zip(NAMES, problem(sizes, dtype=torch.float32), strict=True))
    for name, alter in change.items():
        tensors[name] = alter(tensors[name])
    with pytest.raises(ValueError, match=message):
        deform_attn(*tensors.values(), Grids.of(sizes))


def test_grids_must_be_grids():
    with pytest.raises(ValueError, match="deform_attn: grids must be Grids, got tuple"):
        deform_attn(*problem([(2, 2)]), tuple(Grids.of([(2, 2)])))
