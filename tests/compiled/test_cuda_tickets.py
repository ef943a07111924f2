"""Launches of csrc/ whose blocks wait for each other: right under every schedule, bit for bit the separate launches."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from mixpert_kernels import Routing
from mixpert_kernels.backends.cuda import (
    grouped_layer_norm,
    grouped_linear,
    norm_grouped_linear,
    route,
    route_grouped_linear,
)
from mixpert_kernels.testing import assert_as_accurate

from ._emulate_cuda import emulated, modules, ptx
from ._worker import full

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Images of one, two and one tile. Of the second the view of the whole image is the last tile.
ANYRES = (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 2, 3]))
SINGLE = (None, None)
# Warps stop after a few instructions, nearly always apart: what no barrier and no flag orders comes in any order.
HOSTILE = {"quantum": 3, "split": 0.9}


def problem(
    dtype,
    *,
    tiles=ANYRES,
    expert=None,
    tokens=17,
    depth=72,
    width=136,
    weights=1,
    hidden=None,
    experts=4,
    bias=True,
):
    """Arguments of the backend's function, by name and in order."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape, std=None):
        std = std or (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    x = rand(4, tokens, depth, std=1.0)
    mlp = (None, None) if hidden is None else (rand(hidden, depth), rand(hidden))
    last = 4 * rand(experts, hidden or depth)
    return {
        "x": x + 2 * x.mean(1, keepdim=True),
        "images": (*tiles, None if expert is None else torch.tensor(expert)),
        "router": (rand(depth) + 1, rand(depth, std=0.1), *mlp, last, rand(experts, std=0.1)),
        "rule": (1e-5, "direct", 0.0, "runner_up"),
        "norm": (
            rand(experts, depth, std=0.5) + 1,
            rand(experts, depth, std=0.5) if bias else None,
            1e-6,
        ),
        "weights": [rand(experts, width, depth) for _ in range(weights)],
        "biases": [rand(experts, width, std=1.0) for _ in range(weights)] if bias else [],
        "activation": "gelu_tanh" if weights == 1 else "none",
    }


def fused(p):
    layer = (p["weights"], p["biases"], p["activation"])
    arguments = (p["x"], None, *p["images"], *p["router"], *p["rule"], *p["norm"], *layer)
    return route_grouped_linear.route_grouped_linear(*arguments)


def given(p):
    """norm_grouped_linear for forced routes: its output and the routing."""
    ids = Routing.forced(
        torch.tensor([2, 0, 2, 3]) % p["router"][-1].shape[0], p["router"][-1].shape[0]
    )[:3]
    layer = (p["weights"], p["biases"], *ids, None, p["activation"])
    return norm_grouped_linear.norm_grouped_linear(p["x"], *p["norm"], *layer), ids


def normalised_and_multiplied(p, ids):
    gain, offset, eps = p["norm"]
    h, _, _ = grouped_layer_norm.grouped_layer_norm(p["x"], gain, offset, *ids, None, eps)
    layer = (p["weights"], p["biases"], *ids, None, p["activation"])
    return grouped_linear.grouped_linear(h, *layer, None, None, False)[0]


def separate(p):
    scores, _, *ids = route.route(p["x"], None, *p["images"], *p["router"], *p["rule"])
    return normalised_and_multiplied(p, ids), scores, *ids


def assert_same_bits(got, wanted, note=""):
    names = ("y", "scores", "expert", "order", "offsets")
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        assert torch.equal(ours, theirs), f"{name} differs {note}"


def by_plain_pytorch(p, expert, dtype):
    gain, offset, eps = p["norm"]
    weight = torch.cat(p["weights"], 1).to(dtype)
    bias = torch.cat(p["biases"], 1).to(dtype) if p["biases"] else None
    rows = []
    for x, e in zip(p["x"].to(dtype), expert.tolist(), strict=True):
        shift = None if offset is None else offset[e].to(dtype)
        h = F.layer_norm(x, x.shape[-1:], gain[e].to(dtype), shift, eps)
        z = F.linear(h, weight[e], None if bias is None else bias[e])
        rows.append(F.gelu(z, approximate="tanh") if p["activation"] == "gelu_tanh" else z)
    return torch.stack(rows)


CASES = {
    "anyres": {},
    "single, MLP router, three weights": {"tiles": SINGLE, "hidden": 24, "weights": 3, "width": 40},
    "forced, empty experts": {"expert": [7, 2, 7], "experts": 8},
    "one expert, no bias": {"experts": 1, "bias": False},
    "blocks of rows": {"tokens": 145, "depth": 40, "width": 24},
    "odd columns": {"width": 37},
}
FEW = {
    ("bf16", "blocks of rows", 80, "large"),
    ("fp16", "single, MLP router, three weights", 80, "small"),
    ("fp32", "forced, empty experts", 80, "small"),
    ("bf16", "odd columns", 90, "small"),
}
ALL = [
    pytest.param(*case, marks=() if case in FEW else full)
    for case in [
        (dtype, case, arch, size)
        for dtype in DTYPES
        for case in CASES
        for arch in (80, 90)
        for size in ("small", "large")
    ]
]


@pytest.mark.parametrize("dtype, case, arch, size", ALL)
def test_is_bit_for_bit_the_separate_launches(dtype, case, arch, size):
    p = problem(DTYPES[dtype], **CASES[case])
    with emulated(arch=arch, choose=size) as launches:
        got = fused(p)
    assert [kernel for kernel, _ in launches] == [f"route_grouped_linear_{dtype}_{size}"]
    with emulated(arch=arch, choose=size) as launches:
        wanted = separate(p)
    assert len(launches) == 3, launches
    assert_same_bits(got, wanted)
    plain, truth = (by_plain_pytorch(p, got[2], d) for d in (DTYPES[dtype], torch.float64))
    assert_as_accurate("y", got[0], plain, truth)


GIVEN = {
    "plain": {},
    "three weights": {"weights": 3, "width": 40},
    "one expert, no bias": {"experts": 1, "bias": False},
    "blocks of rows": {"tokens": 145, "depth": 40, "width": 24},
}
FEW_GIVEN = {("bf16", "blocks of rows", 80), ("fp16", "three weights", 90)}


@pytest.mark.parametrize(
    "dtype, case, arch",
    [
        pytest.param(*case, marks=() if case in FEW_GIVEN else full)
        for case in [(d, c, a) for d in DTYPES for c in GIVEN for a in (80, 90)]
    ],
)
def test_with_a_routing_that_is_given(dtype, case, arch):
    p = problem(DTYPES[dtype], **GIVEN[case])
    with emulated(arch=arch, choose="small") as launches:
        got, ids = given(p)
    assert [kernel for kernel, _ in launches] == [f"norm_grouped_linear_{dtype}_small"]
    for size in ("small", "large"):  # above one wave there are two launches, with the same bits
        with emulated(arch=arch, choose=size):
            assert torch.equal(got, normalised_and_multiplied(p, ids)), size
    with emulated(arch=arch, choose="large") as launches:
        assert torch.equal(got, given(p)[0])
    assert len(launches) == 2, launches
    plain, truth = (by_plain_pytorch(p, ids[0], d) for d in (DTYPES[dtype], torch.float64))
    assert_as_accurate("y", got, plain, truth)


@pytest.mark.parametrize(
    "case", [{"depth": 71}, {"depth": 2056, "tokens": 3, "width": 8}, {"apart": True}]
)
def test_what_tickets_do_not_serve_takes_the_separate_launches(case):
    """Rows that are no vectors, rows no warp holds, and weights of two shapes."""
    apart = case.pop("apart", False)
    p = problem(torch.bfloat16, **case)
    if apart:
        p["weights"].append(p["weights"][0][:, :40].contiguous())
        p["biases"].append(p["biases"][0][:, :40].contiguous())
    with emulated(choose="small") as launches:
        got = fused(p)
    assert len(launches) > 2, launches
    with emulated(choose="small"):
        assert_same_bits(got, separate(p))


@pytest.mark.parametrize("routes", [True, False], ids=["route", "norm"])
@pytest.mark.parametrize(
    "arch, interleave, seeds",
    [
        (80, "random", range(2)),
        (80, "warp", range(2, 4)),
        *(
            pytest.param(arch, interleave, range(4, 28), marks=full)
            for arch in (80, 90)
            for interleave in ("random", "warp")
        ),
    ],
    ids=str,
)
def test_any_schedule(arch, interleave, seeds, routes):
    """With one block at a time up to all at once, when most have to wait."""
    # Two tiles an image, 2 row blocks and 9 norm tickets a tile, columns for three of the pooling block's warps.
    p = problem(torch.float16, tokens=70, depth=72, width=72)
    p["x"], p["images"] = p["x"][:2], (torch.tensor([0, 0]), torch.tensor([1]), None)
    if not routes:
        p["x"] = p["x"].repeat(2, 1, 1)
    run = fused if routes else given
    with emulated(arch=arch, choose="small", interleave="lockstep"):
        wanted = run(p)
    for seed in seeds:
        residents = (1, 2, 3, 64)[seed % 4]
        options = {"seed": seed, "interleave": interleave, "resident_ctas": residents}
        with emulated(arch=arch, choose="small", **HOSTILE, **options):
            got = run(p)
        assert torch.equal(got[0], wanted[0]), f"y differs with {options}"
        if routes:
            assert_same_bits(got, wanted, f"with {options}")


def test_a_tile_is_bitwise_the_same_in_any_batch():
    p = problem(torch.bfloat16, tiles=SINGLE)
    with emulated(choose="small"):
        whole, norm = fused(p), given(p)
        for b in (3, 1):
            alone = fused(p | {"x": p["x"][b : b + 1]})
            assert torch.equal(alone[0][0], whole[0][b]), b
            assert torch.equal(alone[1][0], whole[1][b]), b
        turned = p | {"x": p["x"][[2, 1, 0, 3]]}  # tiles 0 and 2 have one expert
        assert torch.equal(given(turned)[0][[2, 1, 0, 3]], norm[0])


def in_order(text):
    """What matters of a kernel, line by line: stores to global memory, barriers, and what releases and acquires."""
    patterns = {
        "store": r"^\s+(@\S+ )?st\.(global|v\d|[a-z]\d|relaxed)",
        "barrier": r"\bbar(rier)?\.(cta\.)?sync",
        "release": r"\b(atom|red|st)\.(acq_rel|release)\.gpu",
        "acquire": r"\bld\.acquire\.gpu",
    }
    lines = (line for line in text.splitlines() if "st.shared" not in line)
    return [name for line in lines for name, p in patterns.items() if re.search(p, line)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, releases", [("route_grouped_linear", 4), ("norm_grouped_linear", 1)])
def test_compiled_code_keeps_the_order_of_memory(arch, dtype, op, releases):
    """What no emulator with one memory for all can see."""
    kernel = f"{op}_{dtype}_small"
    text = ptx(modules(arch)[kernel], arch)
    body = re.search(rf"\.entry {kernel}\(.*?(?=\.entry|\Z)", text, re.DOTALL)[0]
    events = in_order(body)
    assert events.count("release") == releases, events
    assert events.count("acquire") >= 1, events
    for i, event in enumerate(events):
        if event == "release":
            before = [e for e in events[:i] if e in ("store", "barrier")]
            assert before[-1] == "barrier", (i, events)
    assert ".nc" not in body, "a load that may see what was there before the launch"
    assert "cp.async.bulk" not in body, "a load through the asynchronous proxy"
