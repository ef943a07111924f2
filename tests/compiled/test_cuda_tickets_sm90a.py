"""Tickets on sm_90a, which multiply by wgmma: bit for bit the separate launches, whose product reads through TMA."""

from __future__ import annotations

import re

import pytest
import torch

from mixpert_kernels.testing import assert_as_accurate

from . import test_cuda_tickets as tickets
from ._emulate_cuda import emulated, modules, ptx
from ._worker import full

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WGMMA = {"arch": 90, "choose": "wgmma", "multiprocessors": 64}
CASES = {
    "anyres": {},
    "no whole tile of k, odd columns": {"depth": 40, "width": 37, "experts": 1, "bias": False},
    "more tiles of k than buffers": {"depth": 328, "width": 72, "tokens": 20},
    "three weights, two blocks of rows": {"weights": 3, "width": 40, "tokens": 70, "hidden": 24},
}
FEW = {("bf16", case) for case in list(CASES)[1:]} | {("fp16", "anyres")}


@pytest.mark.parametrize(
    "dtype, case",
    [
        pytest.param(dtype, case, marks=() if (dtype, case) in FEW else full)
        for dtype in DTYPES
        for case in CASES
    ],
)
def test_is_bit_for_bit_the_separate_launches(dtype, case):
    p = tickets.problem(DTYPES[dtype], **CASES[case])
    with emulated(**WGMMA) as launches:
        got, (y, ids) = tickets.fused(p), tickets.given(p)
    names = [f"{op}_grouped_linear_{dtype}_wgmma" for op in ("route", "norm")]
    assert [kernel for kernel, _ in launches] == names
    assert launches[1].stats.bank_conflicts == 0 or p["weights"][0].shape[1] % 8, launches[1]
    with emulated(**WGMMA, seed=1) as launches:
        wanted, same = tickets.separate(p), tickets.normalised_and_multiplied(p, ids)
    assert [kernel for kernel, _ in launches].count(f"grouped_linear_{dtype}_wgmma") == 2
    tickets.assert_same_bits(got, wanted)
    assert torch.equal(y, same), "y of a given routing differs"
    plain, truth = (tickets.by_plain_pytorch(p, got[2], d) for d in (DTYPES[dtype], torch.float64))
    assert_as_accurate("y", got[0], plain, truth)


def test_more_blocks_than_pay_take_the_separate_launches():
    # Four tiles, and two blocks of columns each.
    p = tickets.problem(torch.bfloat16, tokens=2, depth=8)
    for multiprocessors, routed, given in ((3, 3, 2), (4, 1, 2), (8, 1, 2), (9, 1, 1)):
        with emulated(**WGMMA | {"multiprocessors": multiprocessors}) as launches:
            tickets.fused(p)
            count = len(launches)
            tickets.given(p)
        assert (count, len(launches) - count) == (routed, given), (multiprocessors, launches)


@pytest.mark.parametrize("first", [0, *(pytest.param(f, marks=full) for f in range(4, 24, 4))])
@pytest.mark.parametrize("interleave", ["random", pytest.param("warp", marks=full)])
@pytest.mark.parametrize("routes", [True, pytest.param(False, marks=full)], ids=["route", "norm"])
def test_any_schedule(interleave, first, routes):
    p = tickets.problem(torch.bfloat16, tokens=70, depth=136, width=40)
    p["x"], p["images"] = p["x"][:2], (torch.tensor([0, 0]), torch.tensor([1]), None)
    if not routes:
        p["x"] = p["x"].repeat(2, 1, 1)
    run = tickets.fused if routes else tickets.given
    with emulated(**WGMMA, interleave="lockstep"):
        wanted = run(p)
    for seed in range(first, first + 4):
        residents = (1, 2, 3, 64)[seed % 4]
        options = {"seed": seed, "interleave": interleave, "resident_ctas": residents}
        with emulated(**WGMMA, **tickets.HOSTILE, **options):
            got = run(p)
        assert torch.equal(got[0], wanted[0]), f"y differs with {options}"


EVENTS = {
    "wait": r"cp\.async\.wait_group",
    "fence": r"fence\.proxy\.async\.shared::cta",
    "barrier": r"\bbar(rier)?\.(cta\.)?sync",
    "multiply": r"wgmma\.fence",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["norm_grouped_linear", "route_grouped_linear"])
def test_a_fence_stands_between_copies_and_wgmma(op, dtype):
    """A thread waits for its copies, shows them to wgmma and meets the others: what no emulator of one memory sees."""
    kernel = f"{op}_{dtype}_wgmma"
    body = re.search(rf"\.entry {kernel}\(.*", ptx(modules(90)[kernel], 90), re.DOTALL)[0]
    lines = body.splitlines()
    found = [name for line in lines for name, p in EVENTS.items() if re.search(p, line)]
    products = [i for i, name in enumerate(found) if name == "multiply"]
    assert products, "it does not multiply"
    for i in products:
        assert found[i - 3 : i] == ["wait", "fence", "barrier"], found[: i + 1]
    order = tickets.in_order(body)
    for i in (i for i, event in enumerate(order) if event == "release"):
        assert [e for e in order[:i] if e != "acquire"][-1] == "barrier", (i, order)
    assert ".nc" not in body and "cp.async.bulk" not in body, "not by plain loads or cp.async"
