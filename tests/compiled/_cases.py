"""What the emulated tests share: small odd problems, and the three results that ``assert_as_accurate`` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixpert_kernels import Routing
from mixpert_kernels.testing import assert_as_accurate

SEEDS = range(3)
EXPERTS = 4
EXPERT = (2, 0, 2)  # experts 1 and 3 have no tile
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ids(expert: Sequence[int] = EXPERT, experts: int = EXPERTS) -> tuple[Tensor | None, ...]:
    """expert, order, offsets, cu_seqlens."""
    return Routing.forced(torch.tensor(expert), experts).ids


def to(dtype: torch.dtype, value: Any) -> Any:
    """Floating tensors, in lists too, in another dtype."""
    if isinstance(value, list):
        return [to(dtype, item) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result, however nested; without the empty ones."""
    if isinstance(results, Tensor):
        return [results] if results.numel() else []
    return [tensor for result in results for tensor in flat(result)]


def check(
    run: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    dtype: torch.dtype,
) -> None:
    """``run(seed, *args)`` is as accurate as the reference, and bit for bit the same under every schedule.

    Args:
        run: the backend's host function, emulated with a scheduler seed.
        reference: the host function that defines it.
        args: of both, floating tensors in float64: what one dtype can hold is what all see.
        dtype: of the features.
    """
    given = [to(dtype, value) for value in args]
    plain = flat(reference(*given))
    truth = flat(reference(*[to(torch.float64, value) for value in given]))
    first = None
    for seed in SEEDS:
        got = flat(run(seed, *given))
        if first is None:
            first = got
            for i, tensors in enumerate(zip(got, plain, truth, strict=True)):
                assert_as_accurate(
                    f"result {i}", tensors[0], tensors[1].to(tensors[0].dtype), tensors[2]
                )
        for i, (one, other) in enumerate(zip(got, first, strict=True)):
            assert torch.equal(one, other), f"result {i} differs with seed {seed}"
