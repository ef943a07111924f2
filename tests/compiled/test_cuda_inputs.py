"""What csrc/ cannot read as it lies is served another way and just as right: every op, forward and backward, emulated.

That bad input is refused, tests/test_cuda_inputs.py shows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mixpert_kernels.backends import cuda
from mixpert_kernels.cli import cases

from ._emulate_cuda import emulated
from ._worker import full

SERVED = [
    op for op in cases.CASES if importlib.util.find_spec(f"mixpert_kernels.backends.cuda.{op}")
]
DTYPES = [torch.bfloat16, pytest.param(torch.float32, marks=full)]


@contextlib.contextmanager
def as_on_a_gpu(**options: object) -> Iterator[list]:
    """The ops take tensors of the CPU to the CUDA backend where it is named."""
    served = mock.patch.object(cuda, "why_not", lambda op, device, dtype: None)
    with served, emulated(**options) as launches:
        yield launches


def tensors(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in cases.draw(cases.CASES[op].shapes).items()}


def results(op: str, given: dict[str, Tensor], turn: Callable = lambda dy: dy) -> dict[str, Tensor]:
    """What an op returns and its gradients, of tensors that stay where they are; ``turn`` lays dy out."""
    case = cases.CASES[op]
    with as_on_a_gpu() as launches:
        if not case.differentiable:
            found = cases.forward(case, given, "cuda")
        else:
            leaves = [t.detach().requires_grad_() for t in given.values()]
            found = case.call(dict(zip(given, leaves, strict=True)), "cuda")
            y = next(iter(found.values()))
            dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
            grads = torch.autograd.grad(y, leaves, turn(dy))
            found |= {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
    assert launches, "nothing was launched"
    return {name: t.detach() for name, t in found.items()}


@functools.cache
def as_it_should_be(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return results(op, tensors(op, dtype))


def within(t: Tensor, shape: list[int], *index: object) -> Tensor:
    """A copy inside of a larger tensor, NaN around it."""
    return torch.full(shape, torch.nan, dtype=t.dtype)[index].copy_(t)


def one_off(t: Tensor) -> Tensor:
    return within(t.flatten(), [t.numel() + 1], slice(1, None)).view(t.shape)


def odd_rows(t: Tensor) -> Tensor:
    return within(t, [*t.shape[:-1], t.shape[-1] + 3], ..., slice(2, -1))


def apart(t: Tensor) -> Tensor:
    return within(t, [*t.shape[:-1], 2 * t.shape[-1]], ..., slice(None, None, 2))


def turned(t: Tensor) -> Tensor:
    order = range(t.ndim)[::-1]
    return t.permute(*order).contiguous().permute(*order)


LAYOUTS = [one_off, *(pytest.param(layout, marks=full) for layout in (odd_rows, apart, turned))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", SERVED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_bit(layout, op, dtype):
    given = tensors(op, dtype)
    laid = {name: layout(t) for name, t in given.items()}
    assert all(torch.equal(laid[name], t) for name, t in given.items()), "the layout is broken"
    got = results(op, laid, layout)
    for name, t in as_it_should_be(op, dtype).items():
        assert torch.equal(got[name], t), f"{name} differs"


@pytest.mark.parametrize("op", ["grouped_linear", "grouped_layer_norm"])
def test_a_gradient_without_memory_of_its_own(op):
    """That of a sum is one number, expanded."""
    given = tensors(op, torch.bfloat16)
    got, wanted = (
        results(op, given, lambda dy, copy=copy: copy(dy.flatten()[:1].expand(dy.shape)))
        for copy in (lambda dy: dy, torch.Tensor.contiguous)
    )
    for name, t in wanted.items():
        assert torch.equal(got[name], t), f"{name} differs"


FAR = 2**30 + 8  # numbers: as bytes past 32 bits, and twice as many numbers too


def far_apart(t: Tensor) -> Tensor:
    """Entries of the first dimension so far apart; memory that nobody touches is never there."""
    numbers = (t.shape[0] - 1) * FAR + t[0].numel()
    memory = torch.from_numpy(np.empty(numbers, np.int16)).view(t.dtype)
    return memory.as_strided(t.shape, [FAR, *t.stride()[1:]]).copy_(t)


@pytest.mark.parametrize("op", SERVED)
def test_offsets_have_64_bits(op):
    given = tensors(op, torch.bfloat16)
    got = results(op, {n: far_apart(t) if t.ndim == 3 else t for n, t in given.items()})
    for name, t in as_it_should_be(op, torch.bfloat16).items():
        assert torch.equal(got[name], t), f"{name} differs"
