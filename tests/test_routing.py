"""Routing: hand-worked tables, an oracle for the sort, and the checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixpert_kernels import Routing


def test_forced_by_hand():
    routing = Routing.forced(torch.tensor([2, 0, 2, 1, 0]), 4)
    assert routing.expert.tolist() == [2, 0, 2, 1, 0]
    assert routing.order.tolist() == [1, 4, 3, 0, 2]
    assert routing.offsets.tolist() == [0, 2, 3, 5, 5]
    assert routing.num_experts == 4
    assert routing.scores is None


def test_single_by_hand():
    routing = Routing.single(3)
    assert routing.expert.tolist() == [0, 0, 0]
    assert routing.order.tolist() == [0, 1, 2]
    assert routing.offsets.tolist() == [0, 3]
    assert routing.num_experts == 1


@given(data=st.data(), experts=st.integers(1, 8), dtype=st.sampled_from((torch.int32, torch.int64)))
def test_order_and_offsets_list_each_experts_tiles_in_batch_order(data, experts, dtype):
    ids = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=40))
    routing = Routing.forced(torch.tensor(ids, dtype=dtype), experts)
    assert all(t.dtype == torch.int32 for t in routing[:3])
    assert routing.expert.tolist() == ids
    order, offsets = routing.order.tolist(), routing.offsets.tolist()
    for e in range(experts):
        assert order[offsets[e] : offsets[e + 1]] == [b for b, i in enumerate(ids) if i == e]
    assert (offsets[0], offsets[-1]) == (0, len(ids))


def test_forced_carries_scores():
    scores = torch.rand(2, 3)
    assert Routing.forced(torch.tensor([0, 1]), 3, scores).scores is scores


BAD = {
    "expert must be an integer tensor, got list": ([0, 1], 2),
    "expert must have dtype int32 or int64, got torch.float32": (torch.zeros(2), 2),
    "expert must have dtype int32 or int64, got torch.bool": (torch.zeros(2).bool(), 2),
    "expert must have 1 dimension, got shape ()": (torch.tensor(0), 2),
    "expert must have 1 dimension, got shape (2, 2)": (torch.zeros(2, 2).long(), 2),
    "expert must lie in 0..1, got 2": (torch.tensor([0, 2]), 2),
    "expert must lie in 0..1, got -1": (torch.tensor([1, -1]), 2),
    "num_experts must be at least 1, got 0": (torch.tensor([0]), 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as error:
        Routing.forced(*BAD[message])
    assert str(error.value) == f"Routing.forced: {message}"
