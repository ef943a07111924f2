"""per_expert_mean."""

from __future__ import annotations

import pytest
import torch
from _towers import refused
from torch import Tensor

from mixpert_kernels.training import loss as loss_module
from mixpert_kernels.training import per_expert_mean

LOSSES = torch.tensor([4.0, 1.0, 3.0, 10.0, 7.0])
EXPERT = torch.tensor([0, 2, 2, 0, 2])
COUNTS = torch.tensor([2, 1, 4, 5, 5])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_sum_of_the_experts_means(dtype: torch.dtype) -> None:
    got = per_expert_mean(LOSSES, EXPERT.to(dtype), 4)
    assert float(got) == pytest.approx((4 + 10) / 2 + (1 + 3 + 7) / 3)
    assert got.shape == ()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_tokens(dtype: torch.dtype) -> None:
    got = per_expert_mean(LOSSES, EXPERT, 3, counts=COUNTS.to(dtype))
    assert float(got) == pytest.approx((4 + 10) / 7 + (1 + 3 + 7) / 10)


def gradient(losses: Tensor, expert: Tensor, counts: Tensor | None = None) -> Tensor:
    leaf = losses.clone().requires_grad_(True)
    per_expert_mean(leaf, expert, 3, counts=counts).backward()
    return leaf.grad


def test_a_sample_has_the_gradient_it_has_among_its_own() -> None:
    """Bitwise: what a mixed batch gives each expert's samples is what they get alone."""
    losses = torch.randn(50, generator=torch.manual_seed(0))
    expert = torch.randint(0, 3, (50,), generator=torch.manual_seed(1))
    tokens = torch.randint(0, 9, (50,), generator=torch.manual_seed(2))
    for counts in (None, tokens):
        mixed = gradient(losses, expert, counts)
        for e in range(3):
            own = expert == e
            alone = gradient(losses[own], expert[own], None if counts is None else counts[own])
            assert torch.equal(mixed[own], alone)
    assert torch.equal(gradient(losses, expert), 1 / torch.bincount(expert)[expert])


def test_no_samples() -> None:
    y = torch.randn(2, 3, requires_grad=True)
    got = per_expert_mean(y[:0].sum(1), torch.zeros(0, dtype=torch.long), 3)
    assert float(got.detach()) == 0.0
    got.backward()
    assert torch.equal(y.grad, torch.zeros(2, 3))


def test_an_expert_without_tokens_adds_nothing() -> None:
    losses = torch.tensor([2.0, 0.0], requires_grad=True)
    got = per_expert_mean(losses, torch.tensor([0, 1]), 2, counts=torch.tensor([4, 0]))
    assert float(got.detach()) == 0.5
    got.backward()
    assert losses.grad.isfinite().all() and losses.grad[0] == 0.25


def test_an_expert_whose_loss_is_nan_spoils_no_other_gradient() -> None:
    got = gradient(torch.tensor([float("nan"), 1.0, 2.0]), torch.tensor([0, 1, 1]))
    assert got.tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_accurate(dtype: torch.dtype) -> None:
    """2000 losses of 1 add up: in bfloat16 they would stop at 256."""
    losses = torch.ones(2000, dtype=dtype, requires_grad=True)
    got = per_expert_mean(losses, torch.zeros(2000, dtype=torch.long), 2)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(got.detach()) == 1.0
    got.backward()
    assert losses.grad.dtype == dtype


def test_token_counts_beyond_float32() -> None:
    counts = torch.tensor([2**24, 1, 1, 1, 1])
    got = per_expert_mean(
        torch.ones(5).double() * 2**24, torch.zeros(5, dtype=torch.long), 1, counts=counts
    )
    assert float(got) == 5 * 2**24 / (2**24 + 4)


def test_in_a_process_group_counts_are_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has 3 samples of expert 0 and one of expert 1; tests/test_distributed.py has real ones."""

    def all_reduce(totals: Tensor) -> None:
        totals += torch.tensor([3, 1, 0])

    monkeypatch.setattr(loss_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loss_module.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(loss_module.dist, "get_world_size", lambda: 2)
    got = per_expert_mean(LOSSES, EXPERT, 3)
    assert float(got) == pytest.approx(2 * ((4 + 10) / 5 + (1 + 3 + 7) / 3))


def test_bad_arguments_are_refused() -> None:
    call = per_expert_mean
    refused(lambda: call(LOSSES[None], EXPERT, 3), "per_expert_mean: losses must be", "(1, 5)")
    refused(lambda: call(COUNTS, EXPERT, 3), "losses must be floating point", "int64")
    refused(lambda: call(LOSSES, EXPERT[:4], 3), "expert must be 5 integers", "(4,)")
    refused(lambda: call(LOSSES, EXPERT.float(), 3), "expert must be 5 integers", "float32")
    refused(lambda: call(LOSSES, EXPERT == 0, 3), "expert must be 5 integers", "bool")
    refused(lambda: call(LOSSES, EXPERT, 2), "expert must lie in 0..1, got 2")
    refused(lambda: call(LOSSES, EXPERT - 1, 3), "expert must lie in 0..2, got -1")
    refused(lambda: call(LOSSES, EXPERT, 0), "num_experts must be at least 1, got 0")
    refused(
        lambda: call(LOSSES, EXPERT, 3, counts=COUNTS[:2]), "counts must have shape (5,)", "(2,)"
    )
    refused(lambda: call(LOSSES, EXPERT, 3, counts=-COUNTS), "counts must not be negative, got -5")
