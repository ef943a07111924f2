"""route and its backward, compiled and emulated: numbers, hostile schedules, the barriers before atomics, bits."""

from __future__ import annotations

import re

import pytest
import torch

from mixpert_kernels.backends.reference import route as plain
from mixpert_kernels.routing import counting_sort
from mixpert_kernels.testing import assert_as_accurate

from ._emulate import emulated
from ._worker import full

EPS = 1e-5
RAGGED = [0, 0, 1, 2, 2], [1, 2, 3]  # image_of_tile, base_tile
HOSTILE = {"quantum": 3, "split": 0.9}  # a missing barrier shows under no gentler schedule


def problem(tokens, width, experts, hidden=None, dtype=torch.float32):
    """x and the router's six parameters."""
    generator = torch.Generator().manual_seed(width)

    def rand(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (t * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).to(dtype)

    x = torch.randn(5, tokens, width, generator=generator, dtype=torch.float64)
    mlp = (None, None) if hidden is None else (rand(hidden, width), rand(hidden))
    last = rand(experts, hidden or width) * 3, rand(experts)
    x = (x + 2 * x.mean(1, keepdim=True)).to(dtype)  # images differ
    return x, [rand(width), rand(width), *mlp, *last]


def ours():
    from mixpert_kernels.backends.triton import route

    return route


def run(backend, x, weights, expert=None, ragged=True):
    """scores, pooled, expert, order, offsets."""
    tiles = [torch.tensor(t) for t in RAGGED] if ragged else (None, None)
    return backend.route(
        x, None, *tiles, expert, *weights, EPS, "score_difference", 0.1, "runner_up"
    )


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dtype, tokens, width, experts, hidden",
    [
        (torch.bfloat16, 17, 72, 3, None),
        (torch.float16, 70, 72, 9, 40),
        pytest.param(torch.float32, 40, 136, 64, None, marks=full),
        pytest.param(torch.bfloat16, 729, 1152, 4, None, marks=full),
        pytest.param(torch.bfloat16, 1, 9, 1, 5, marks=full),
    ],
    ids=str,
)
def test_scores_decisions_and_gradients(arch, dtype, tokens, width, experts, hidden):
    x, weights = problem(tokens, width, experts, hidden, dtype)
    with emulated(arch=arch, resident_ctas=3) as launches:
        got = run(ours(), x, weights)
    assert len(launches) == 1, "one launch"
    wanted, truth = run(plain, x, weights), run(plain, x.double(), double(weights))
    assert_as_accurate("scores", got[0], wanted[0], truth[0])
    assert_as_accurate("pooled", got[1], wanted[1], truth[1])
    chosen = plain.decide(got[0], "score_difference", 0.1, "runner_up")[torch.tensor(RAGGED[0])]
    for ids, sorted_ids in zip(got[2:], counting_sort(chosen, experts), strict=True):
        assert torch.equal(ids, sorted_ids), (ids, sorted_ids)

    generator = torch.Generator().manual_seed(1)
    dscores, dpooled = (torch.randn(t.shape, generator=generator) for t in wanted[:2])

    def gradients(backend, x, weights, scores, pooled):
        given = (t.to(scores.dtype) for t in (dscores, dpooled / 10))
        rest = (*weights[:5], scores, pooled, EPS, True)
        return backend.route_backward(*given, x, None, torch.tensor(RAGGED[1]), *rest)

    with emulated(arch=arch, resident_ctas=3) as launches:
        got = gradients(ours(), x, weights, *wanted[:2])
    assert len(launches) == 3, "three launches"
    wide = [None if w is None else w.float() for w in weights]
    usual = gradients(plain, x.float(), wide, *wanted[:2])
    exact = gradients(plain, x.double(), double(weights), *truth[:2])
    for i, (g, w, t) in enumerate(zip(got, usual, exact, strict=True)):
        assert_as_accurate(f"gradient {i}", g, w.to(g.dtype), t)
    assert got[0][[0, 4]].eq(0).all(), "tiles that are the base of no image"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("resident_ctas", [2, 64])
@pytest.mark.parametrize("interleave", ["random", "warp"])
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 20), marks=full)], ids=str)
def test_hostile_schedules_change_no_bit(arch, resident_ctas, interleave, seeds):
    x, weights = problem(40, 24, 3, 6, torch.float16)
    with emulated(arch=arch):
        wanted = run(ours(), x, weights)
    options = {"resident_ctas": resident_ctas, "interleave": interleave, **HOSTILE}
    for seed in seeds:
        with emulated(arch=arch, seed=seed, **options):
            got = run(ours(), x, weights)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), f"seed {seed}"


def barriers(ptx):
    """For each atomic that releases: whether a barrier comes after the last store to global memory before it."""
    found, safe = [], False
    for line in ptx.splitlines():
        if re.search(r"\bst\.\S*global", line):
            safe = False
        elif re.search(r"\bbar(rier)?\.\S*sync|\bbarrier\.sync", line):
            safe = True
        elif re.search(r"\batom\.\S*(acq_rel|release)", line):
            found.append(safe)
    return found


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("hidden", [None, 6])
def test_a_barrier_stands_between_the_stores_and_each_release(arch, hidden):
    x, weights = problem(40, 24, 3, hidden, torch.float16)
    with emulated(arch=arch) as launches:
        run(ours(), x, weights)
    assert barriers(launches[0].stats.compiled.ptx) == [True, True], (
        "arrival of a program, of an image"
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_bits_depend_neither_on_the_batch_nor_on_alignment_nor_on_warps(arch):
    """Rows of 9 halves: each tile is aligned in another way, so that it is compiled in another way, too."""
    import dataclasses

    from mixpert_kernels.backends.triton import _configs

    x, weights = problem(40, 9, 5, 6, torch.float16)
    with emulated(arch=arch):
        whole = run(ours(), x, weights, ragged=False)
    table = _configs.ROUTE
    for warps in (4, 16):
        _configs.ROUTE = tuple(dataclasses.replace(row, num_warps=warps) for row in table)
        try:
            for b in (1, 4):
                with emulated(arch=arch):
                    alone = run(ours(), x[b : b + 1], weights, ragged=False)
                for one, all_of_them in zip(alone[:3], whole[:3], strict=True):
                    assert torch.equal(one[0], all_of_them[b]), (b, warps)
        finally:
            _configs.ROUTE = table
