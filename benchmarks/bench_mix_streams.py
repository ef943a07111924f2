"""mix_streams at a language model's width: a matter of how often the streams are read and written."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from torch import Tensor

from mixpert_kernels import ops
from mixpert_kernels.backends import BACKENDS, why_not

STREAMS, TOKENS = 3, 256
CASES = {
    "ci": [(2, 64, False), (2, 64, True)],
    "default": [(8, 4096, False), (4, 4096, True)],
    "full": [(1, 4096, False), (8, 4096, False), (32, 4096, False), (8, 4096, True)],
}[SIZE]
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("stacked", "added", "einsum")


def stacked(logits: Tensor, cls: Tensor, *streams: Tensor) -> Tensor:
    """Softmax, stack, weighted sum, cat."""
    g = logits.float().softmax(-1).to(cls.dtype)
    mixed = (torch.stack(streams, 1) * g[:, :, None, None]).sum(1)
    return torch.cat([cls[:, None], mixed], 1)


def added(logits: Tensor, cls: Tensor, *streams: Tensor) -> Tensor:
    """Stream by stream, into the result."""
    g = logits.float().softmax(-1).to(cls.dtype)[..., None, None]
    y = torch.empty(cls.shape[0], TOKENS + 1, cls.shape[1], dtype=cls.dtype, device=cls.device)
    y[:, 0] = cls
    mixed = torch.mul(streams[0], g[:, 0], out=y[:, 1:])
    for i, stream in enumerate(streams[1:], 1):
        mixed.addcmul_(stream, g[:, i])
    return y


def einsum(logits: Tensor, cls: Tensor, *streams: Tensor) -> Tensor:
    """A product of one row with each image's streams."""
    g = logits.float().softmax(-1).to(cls.dtype)
    mixed = torch.einsum("bn,bnld->bld", g, torch.stack(streams, 1))
    return torch.cat([cls[:, None], mixed], 1)


def scenario(batch: int, width: int, training: bool) -> Scenario:
    generator = torch.Generator().manual_seed(batch)
    shapes = [(batch, STREAMS), (batch, width), *[(batch, TOKENS, width)] * STREAMS]
    tensors = [torch.randn(s, generator=generator).to(DEVICE, DTYPE) for s in shapes]
    dy = torch.randn(batch, TOKENS + 1, width, generator=generator).to(DEVICE, DTYPE)

    def step(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> Callable:
        """The output; in training also all gradients."""
        if not training:
            return lambda: function(*tensors)
        leaves = [t.clone().requires_grad_() for t in tensors]

        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return call

    def ours(backend: str) -> Callable:
        reason = why_not("mix_streams", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        function = lambda logits, cls, *s: ops.mix_streams(logits, s, cls, backend=backend)  # noqa: E731
        return step(function, tensors, dy)

    def other(function: Callable[..., Tensor]) -> Callable:
        if training and function is added:
            raise Unavailable("writes in place, which has no gradient")
        return step(function, tensors, dy)

    passes = STREAMS + 1 + training * (2 * STREAMS + 1)
    return Scenario(
        name=f"mix_streams {STREAMS} x ({TOKENS}, {width}), B={batch}"
        + ", forward and backward" * training,
        truth=step(stacked, [t.float() for t in tensors], dy.float()),
        base="stacked",
        variants=(
            *(Variant(f"ours_{b}", functools.partial(ours, b)) for b in BACKENDS),
            *(Variant(f.__name__, functools.partial(other, f)) for f in (stacked, added, einsum)),
        ),
        moved=float(passes * tensors[2].nbytes),
        info={
            "bench": "mix_streams",
            "geometry": f"{width}",
            "batch": batch,
            "route": "training" if training else "inference",
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize(("batch", "width", "training"), CASES)
def test_mix_streams(
    record: Callable[..., None], batch: int, width: int, training: bool, variant: str
) -> None:
    record(scenario, batch, width, training, variant=variant)
