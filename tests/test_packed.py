"""Packed rows (R, D) with cu_seqlens: every op and backend, against the (B, T, D) form and a loop over the images."""

from __future__ import annotations

import math

import pytest
import torch
from _packed import (
    DIFFERENTIABLE,
    DIRECT,
    DTYPES,
    EXPERT,
    FEATURES,
    LENGTHS,
    NAMES,
    ROUTED,
    ROUTING,
    SHAPES,
    E,
    all_backends,
    all_ops,
    call,
    draw_dys,
    everything,
    plain,
    problem,
    resized,
    runs_here,  # noqa: F401, a fixture of every test
)

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS
from mixpert_kernels.testing import assert_as_accurate


@pytest.mark.parametrize("op", ["grouped_linear"])
@all_backends
def test_grouped_linear_by_hand(op, backend):
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
    weight, bias = torch.tensor([[[1.0, 1.0]], [[1.0, 10.0]]]), torch.tensor([[0.5], [-1.0]])
    scale, residual = torch.tensor([[2.0], [3.0]]), torch.tensor([[100.0], [200.0], [300.0]])
    # Tiles of 2, 0 and 1 rows.
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    routing = Routing.forced(torch.tensor([1, 1, 0]), 2, cu_seqlens=cu)
    options = {"activation": "relu", "residual": residual, "scale": scale, "backend": backend}
    y = ops.grouped_linear(x, weight, bias, routing, **options)
    # 3 relu(1 + 20 - 1) + 100 ; 3 relu(3 - 40 - 1) + 200 ; 2 relu(0.5 + 0.5) + 300
    assert y.flatten().tolist() == [160.0, 200.0, 302.0]


@pytest.mark.parametrize("op", ["route"])
@all_backends
def test_route_by_hand(op, backend):
    x = torch.tensor([[0.0, 2.0], [8.0, 0.0], [0.0, 6.0], [0.0, 2.0], [5.0, 1.0]])
    none = torch.zeros(2)
    identity = ops.RouterWeights(torch.ones(2), none, None, None, torch.eye(2), none)
    cu = torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)  # means (4, 1), none, (0, 4), (5, 1)
    routing = ops.route(x, identity, DIRECT, cu_seqlens=cu, backend=backend)
    assert routing.expert.tolist() == [0, 0, 1, 0]
    assert routing.offsets.tolist() == [0, 3, 4] and routing.order.tolist() == [0, 1, 3, 2]
    assert routing.cu_seqlens is cu and routing.scores[1].isnan().all()
    tiles = {"image_of_tile": torch.tensor([0, 0, 1, 1]), "base_tile": torch.tensor([2, 3])}
    routing = ops.route(x, identity, DIRECT, cu_seqlens=cu, backend=backend, **tiles)
    assert routing.expert.tolist() == [1, 1, 0, 0]
    expert = torch.tensor([0, 1])
    routing = ops.route(x, identity, DIRECT, cu_seqlens=cu, backend=backend, expert=expert, **tiles)
    assert routing.expert.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_backends
@all_ops
def test_tiles_of_one_length_are_bit_for_bit_what_they_are_unpacked(op, backend, dtype):
    lengths, expert = [7] * 4, (2, 0, 2, 3)
    p = problem(op, lengths, dtype)
    tiles = {n: t.unflatten(0, (4, 7)) if n in FEATURES else t for n, t in p.items()}
    wanted = everything(op, lambda p: call(op, p, None, expert, backend), tiles)
    got = everything(op, lambda p: call(op, p, lengths, expert, backend), p)
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name].reshape(tensor.shape)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_backends
@all_ops
def test_is_as_accurate_as_a_loop_over_the_images(op, backend, dtype):
    lengths = LENGTHS if op not in ROUTING else (5, 2, 1, 70, 17, 3)  # all finite
    p = problem(op, lengths, dtype)
    got = everything(op, lambda p: call(op, p, lengths, backend=backend), p)
    loop = everything(op, lambda p: plain(op, p, lengths), p)
    truth = everything(op, lambda p: plain(op, p, lengths), p, torch.float64)
    draws = {name: [] for name in got}
    for seed in (1, 2, 3):
        other = problem(op, lengths, dtype, seed)
        usual = everything(op, lambda p: plain(op, p, lengths), other)
        exact = everything(op, lambda p: plain(op, p, lengths), other, torch.float64)
        for name in draws:
            draws[name].append((usual[name], exact[name]))
    for name, tensor in got.items():
        assert_as_accurate(name, tensor, loop[name], truth[name], draws=draws[name])


def by_image(name, t, lengths):
    """The images of a result or gradient that follows the batch; None for a parameter's gradient."""
    if name.startswith("scores"):
        return t.unbind()
    follows = name in ("y", "y in inference", "dx", "dresidual")
    return t.split(lengths) if follows else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])  # that promises rounding
@all_ops
def test_an_image_is_bitwise_the_same_alone_and_in_any_order(op, backend, dtype):
    """On the reference with odd sizes, so that rows are misaligned and vectors have a remainder."""
    sizes = resized(23, 9, 17) if backend == "reference" else SHAPES
    p = problem(op, dtype=dtype, sizes=sizes)
    dys = draw_dys(call(op, p))

    def run(tiles):
        lengths, expert = [LENGTHS[b] for b in tiles], [EXPERT[b] for b in tiles]

        def pick(name, t):
            return torch.cat([t.split(LENGTHS)[b] for b in tiles])

        some = {n: pick(n, t) if n in FEATURES else t for n, t in p.items()}
        dy = {n: pick(n, t) if n == "y" else t[list(tiles)] for n, t in dys.items()}
        options = {
            "backend": backend,
            "activation": "gelu_tanh",
        }  # whose remainder rounds otherwise
        found = everything(op, lambda p: call(op, p, lengths, expert, **options), some, dys=dy)
        images = {n: by_image(n, t, lengths) for n, t in found.items()}
        return found, {n: dict(zip(tiles, t, strict=True)) for n, t in images.items() if t}

    whole, first = run(range(6))
    for tiles in [(5, 2, 0, 4, 1, 3), *[(b,) for b in range(6) if LENGTHS[b]]]:
        for name, images in run(tiles)[1].items():
            for b, t in images.items():
                exact = {"rtol": 0, "atol": 0, "equal_nan": True}
                torch.testing.assert_close(t, first[name][b], **exact, msg=f"{name} {tiles} {b}")
    for e in range(E) if op in ROUTED and op in DIFFERENTIABLE else ():
        tiles = [b for b in range(6) if EXPERT[b] == e and LENGTHS[b]]
        own = run(tiles)[0] if tiles else None
        for name in NAMES[op]:
            if name in FEATURES:
                continue
            got = whole[f"d{name}"][e]
            if own is None:
                assert got.eq(0).all(), f"{name} of expert {e}, which has no row"
            else:
                assert torch.equal(got, own[f"d{name}"][e]), (name, e)


@all_backends
@all_ops
def test_a_tile_of_nans_touches_no_other_tile_and_no_other_expert(op, backend):
    p = problem(op, dtype=torch.float32)
    wanted = everything(op, lambda p: call(op, p, backend=backend), p)
    x = p["x"].clone()
    x.split(LENGTHS)[3].fill_(math.nan)
    bad = p | {"x": x}
    got = everything(op, lambda p: call(op, p, backend=backend), bad)
    for name, t in got.items():
        images, usual = (by_image(name, r[name], LENGTHS) for r in (got, wanted))
        if images is not None:
            for b in (0, 2, 4):
                assert torch.equal(images[b], usual[b]), (name, b)
        elif op in ROUTED:
            assert torch.equal(t[[0, 1, 2, 4]], wanted[name][[0, 1, 2, 4]]), name
