"""The launch whose programs wait for each other: right under every schedule, bit for bit what three launches give."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mixpert_kernels.backends.triton import (
    _configs,
    grouped_layer_norm,
    grouped_linear,
    route,
    route_grouped_linear,
)
from mixpert_kernels.testing import assert_as_accurate

from ._emulate import emulated
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
        "norm": (rand(experts, depth, std=0.5) + 1, rand(experts, depth, std=0.5), 1e-6),
        "weights": [rand(experts, width, depth) for _ in range(weights)],
        "biases": [rand(experts, width, std=1.0) for _ in range(weights)],
        "activation": "gelu",
    }


def fused(p):
    layer = (p["weights"], p["biases"], p["activation"])
    arguments = (p["x"], None, *p["images"], *p["router"], *p["rule"], *p["norm"], *layer)
    return route_grouped_linear.route_grouped_linear(*arguments)


def separate(p):
    gain, offset, eps = p["norm"]
    scores, _, *ids = route.route(p["x"], None, *p["images"], *p["router"], *p["rule"])
    h, _, _ = grouped_layer_norm.grouped_layer_norm(p["x"], gain, offset, *ids, None, eps)
    layer = (p["weights"], p["biases"], *ids, None, p["activation"])
    y, _ = grouped_linear.grouped_linear(h, *layer, None, None, False)
    return y, scores, *ids


def assert_same_bits(got, wanted, note=""):
    names = ("y", "scores", "expert", "order", "offsets")
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        assert torch.equal(ours, theirs), f"{name} differs {note}"


CASES = {
    "anyres": {},
    "single, MLP router, three weights": {"tiles": SINGLE, "hidden": 24, "weights": 3, "width": 40},
    "forced, empty experts": {"expert": [7, 2, 7], "experts": 8},
    "one expert": {"experts": 1},
    "blocks of rows": {"tokens": 130, "depth": 40, "width": 24},
}
FEW = {("bf16", "anyres"), ("bf16", "blocks of rows"), ("fp32", "forced, empty experts")}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dtype, case",
    [
        pytest.param(dtype, case, marks=() if (dtype, case) in FEW else full)
        for dtype in DTYPES
        for case in CASES
    ],
)
def test_is_bit_for_bit_the_three_launches(arch, dtype, case):
    p = problem(DTYPES[dtype], **CASES[case])
    with emulated(arch=arch) as launches:
        got = fused(p)
    assert len(launches) == 1, launches
    with emulated(arch=arch) as launches:
        wanted = separate(p)
    assert len(launches) == 3, launches
    assert_same_bits(got, wanted)
    plain, truth = (by_plain_pytorch(p, got[2], d) for d in (DTYPES[dtype], torch.float64))
    assert_as_accurate("y", got[0], plain, truth)


def by_plain_pytorch(p, expert, dtype):
    gain, offset, eps = p["norm"]
    weight, bias = torch.cat(p["weights"], 1), torch.cat(p["biases"], 1)
    rows = []
    for x, e in zip(p["x"].to(dtype), expert.tolist(), strict=True):
        h = F.layer_norm(x, x.shape[-1:], gain[e].to(dtype), offset[e].to(dtype), eps)
        rows.append(F.gelu(F.linear(h, weight[e].to(dtype), bias[e].to(dtype))))
    return torch.stack(rows)


def small(on, dtype, width):
    """Blocks so small that there are several of each kind, and schedules by the dozen are quick."""
    gemm = _configs.GemmConfig(64, 16, 16, group=2, num_warps=4, num_stages=2)
    norm = _configs.layer_norm(width, dtype.itemsize, num_warps=4)
    return _configs.TicketConfig(gemm, norm, _configs.route_config(width), norm_rows=32)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("interleave", ["random", "warp"])
@pytest.mark.parametrize("first", [0, 8, 16])
def test_any_schedule(arch, interleave, first):
    """24 schedules, with one program at a time up to all at once, when most have to wait."""
    p = problem(torch.bfloat16, tokens=70, depth=40, width=24)
    with mock.patch.object(_configs, "tickets", small):
        with emulated(arch=arch, interleave="lockstep"):
            wanted = fused(p)
        for seed in range(first, first + 8):
            residents = (1, 2, 3, 64)[seed % 4]
            options = {"seed": seed, "interleave": interleave, "resident_ctas": residents}
            with emulated(arch=arch, **HOSTILE, **options):
                assert_same_bits(fused(p), wanted, f"with {options}")
    with emulated(arch=arch):
        _, *routing = separate(p)
    assert_same_bits(wanted, (wanted[0], *routing))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("residents", [1, pytest.param(2, marks=full), pytest.param(3, marks=full)])
@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(d, marks=full) for d in ("fp16", "fp32"))]
)
def test_shipped_configs_on_a_full_gpu(arch, residents, dtype):
    """Fewer programs at a time than tickets."""
    p = problem(DTYPES[dtype])
    with emulated(arch=arch):
        wanted = separate(p)
    with emulated(arch=arch, seed=residents, resident_ctas=residents, **HOSTILE):
        assert_same_bits(fused(p), wanted)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code_keeps_the_order_of_memory(arch):
    """What no emulator with one memory for all can see, and a newer Triton would mend by itself."""
    with emulated(arch=arch) as launches:
        fused(problem(torch.bfloat16, width=24))
    ptx, ttgir = (launches[0].stats.compiled.asm[stage] for stage in ("ptx", "ttgir"))
    ordered = re.findall(r"(?:atom|red|ld)\.global\.gpu\.(\w+)", ptx)
    # The ticket; an image's arrival, its expert, the count of images; normalised rows; three waits.
    expected = ["relaxed", "acq_rel", "release", "acq_rel", "release", *["acquire"] * 3]
    assert sorted(ordered) == sorted(expected), ordered
    assert ".nc" not in ptx, "a read-only load"
    assert "cp.async.bulk" not in ptx, "a load through the asynchronous proxy"
    for text, release, barrier, store in (
        (ptx, r"\.global\.gpu\.(release|acq_rel)\.", r"\bbar\.sync\b", r"\bst\.global\b"),
        (ttgir, r"tt\.atomic_rmw \w+, (release|acq_rel),", r"\b(ttg|gpu)\.barrier\b", r"\btt\.store\b"),
    ):  # fmt: skip
        lines = text.splitlines()
        found = [i for i, line in enumerate(lines) if re.search(release, line)]
        assert len(found) == 4, found
        for i in found:
            before = (
                line
                for line in reversed(lines[:i])
                if re.search(f"{barrier}|{store}|{release}", line)
            )
            assert re.search(barrier, next(before)), f"no barrier before line {i}: {lines[i]}"
