"""Grids: the carrier of ragged H x W features."""

from __future__ import annotations

import pytest
import torch

from mixpert_kernels.grids import Grids, require_grids


def test_sizes_become_rows_in_order():
    grids = Grids.of([(2, 3), (1, 4), (5, 1)])
    assert grids.batch == 3
    assert grids.sizes.tolist() == [[2, 3], [1, 4], [5, 1]]
    assert grids.cu_seqlens.tolist() == [0, 6, 10, 15]
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in grids)


def test_images_of_one_size_are_the_same_either_way():
    for one, other in zip(Grids.same(3, 4, 5), Grids.of([(4, 5)] * 3), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Grids.of([]), "sizes must hold at least one"),
        (lambda: Grids.of([(2, 2), (0, 3)]), "sizes must be at least 1 x 1, got 0 x 3"),
        (lambda: Grids.same(0, 2, 2), "batch must be at least 1, got 0"),
        (lambda: Grids.same(1, 2, -1), "width must be at least 1, got -1"),
    ],
)
def test_a_size_below_one_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GOOD = Grids.of([(2, 3), (1, 4)])


@pytest.mark.parametrize(
    "grids, message",
    [
        (tuple(GOOD), "grids must be Grids, got tuple"),
        (GOOD._replace(sizes=GOOD.sizes[:, :1]), r"grids.sizes must have shape \(B, 2\), got"),
        (GOOD._replace(cu_seqlens=GOOD.cu_seqlens[:2]), r"grids.cu_seqlens must have shape \(3,\)"),
        (GOOD._replace(sizes=GOOD.sizes.long()), "grids.sizes must have dtype int32, got"),
        (GOOD._replace(sizes=GOOD.sizes.T.contiguous().T), "grids.sizes must be contiguous, got"),
        (GOOD._replace(sizes=GOOD.sizes.to("meta")), "grids.sizes must be on the device of f, cpu"),
        (
            GOOD._replace(sizes=GOOD.sizes + 1),
            r"grids must have as many rows an image as H \* W, got 6 rows for image 0 of 3 x 4",
        ),
        (Grids.of([(2, 3), (1, 5)]), "grids.cu_seqlens must ascend from 0 to the 10 rows of f"),
    ],
)
def test_what_a_kernel_takes_for_granted_is_checked(grids, message):
    with pytest.raises(ValueError, match=message):
        require_grids("op", grids, torch.zeros(10, 2), "f")


def test_fitting_grids_pass():
    require_grids("op", GOOD, torch.zeros(10, 2), "f")
