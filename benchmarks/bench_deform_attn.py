"""deform_attn at the sizes of an ADT layer, forward and with backward: one launch against a loop over the images.

`image_loop` calls `grid_sample` image by image, as the original does. `transformers` is Deformable-DETR's attention
without its projections. It needs one H x W for the whole batch, so it takes part where all images have one size, and
not in the ragged batches. `ops` is how many calls of ops compute something. One of this library is one launch on
a GPU, and with backward three more, a memset and in half precision a cast; on a CPU the check of the grids counts too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _adt_baselines import Launches
from _harness import DEVICE, DTYPE, SIZE, Output, Scenario, Unavailable, Variant
from torch import Tensor

from mixpert_kernels import Grids, ops
from mixpert_kernels.backends import BACKENDS, why_not

RAGGED = ((45, 45), (1, 2048), (64, 31), (12, 100))
CASES = {  # sizes, heads, d, queries
    "ci": {"uniform": (((6, 6),) * 2, 2, 16, 16), "ragged": (((7, 5), (1, 40)), 2, 16, 16)},
    "default": {"uniform": (((32, 32),) * 4, 8, 128, 256), "ragged": (RAGGED, 8, 96, 256)},
    "full": {"uniform": (((32, 32),) * 16, 8, 128, 256), "ragged": (RAGGED * 4, 8, 96, 256)},
}[SIZE]
POINTS = 4
OTHERS = ("image_loop", "transformers")
VARIANTS = (*(f"ours_{backend}" for backend in BACKENDS), *OTHERS)


class Case:
    """The tensors of one batch, and what computes its attention, as functions of value and offsets."""

    def __init__(self, kind: str) -> None:
        self.sizes, heads, d, queries = CASES[kind]
        generator = torch.Generator().manual_seed(0)
        batch, rows = len(self.sizes), sum(h * w for h, w in self.sizes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)

        self.value = normal(rows, 6, heads, d)[:, 1]  # of all layers' values, the second
        self.offsets = 2 * normal(batch, queries, heads, POINTS, 2)
        self.logits = normal(batch, queries, heads, POINTS)
        self.reference = torch.rand(queries, 2, generator=generator).to(DEVICE, DTYPE)
        self.dy = normal(batch, queries, heads * d)

    def ours(self, backend: str) -> Callable[..., Tensor]:
        reason = why_not("deform_attn", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        grids = Grids.of(self.sizes, DEVICE)
        return lambda *tensors: ops.deform_attn(*tensors, self.reference, grids, backend=backend)

    def image_loop(self) -> Callable[..., Tensor]:
        def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            images = value.split([h * w for h, w in self.sizes])
            found = [
                self.sampled(image, offset, logit.softmax(-1), size)
                for image, offset, logit, size in zip(
                    images, offsets, logits, self.sizes, strict=True
                )
            ]
            return torch.stack(found)

        return call

    def sampled(
        self, image: Tensor, offsets: Tensor, weights: Tensor, size: tuple[int, int]
    ) -> Tensor:
        place = self.reference[:, None, None] + offsets / offsets.new_tensor(size[::-1])
        grid = (2 * place - 1).transpose(0, 1)  # (heads, Q, points, 2)
        patches = image.permute(1, 2, 0).unflatten(2, size)
        samples = F.grid_sample(patches, grid, align_corners=False)  # (heads, d, Q, points)
        return (samples * weights.transpose(0, 1)[:, None]).sum(-1).permute(2, 0, 1).flatten(1)

    def transformers(self) -> Callable[..., Tensor]:
        if len(set(self.sizes)) > 1:
            raise Unavailable("its images have one size")
        from transformers.models.deformable_detr.modeling_deformable_detr import (
            MultiScaleDeformableAttention,
        )

        attention, size = MultiScaleDeformableAttention(), self.sizes[0]
        shapes, start = torch.tensor([size], device=DEVICE), torch.zeros(1, device=DEVICE).long()

        def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            place = self.reference[:, None, None] + offsets / offsets.new_tensor(size[::-1])
            value = value.unflatten(0, (len(self.sizes), -1))
            weights = logits.softmax(-1)[:, :, :, None]
            return attention(value, shapes, [size], start, place[:, :, :, None], weights, 64)

        return call

    def build(self, name: str) -> Callable[..., Tensor]:
        return self.ours(name.removeprefix("ours_")) if name in VARIANTS[:-2] else getattr(self, name)()  # fmt: skip

    def run(self, function: Callable[..., Tensor], train: bool, dtype=None) -> Output:
        """The output; in training also the gradient of value. That of offsets jumps at whole pixels."""
        tensors = [t.to(dtype) for t in (self.value, self.offsets, self.logits)]
        if not train:
            return function(*tensors)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(*leaves)
            dvalue, *_ = torch.autograd.grad(y, leaves, self.dy.to(y.dtype))
        return y.detach(), dvalue.flatten()[None]


@functools.lru_cache(maxsize=1)
def setup(kind: str) -> Case:
    return Case(kind)


def scenario(kind: str, train: bool) -> Scenario:
    case = setup(kind)

    def variant(name: str) -> Variant:
        def build() -> Callable[[], Output]:
            function = case.build(name)
            return lambda: case.run(function, train)

        return Variant(name, build, info={"ops": launches(case, name, train)})

    def truth() -> Output:
        exact = Case(kind)
        exact.reference = exact.reference.double()
        return exact.run(exact.image_loop(), train, torch.float64)

    return Scenario(
        name=f"deform_attn {kind}, {'forward and backward' if train else 'forward'}, B={len(case.sizes)}",
        truth=truth,
        base="image_loop",
        variants=tuple(variant(name) for name in VARIANTS),
        info={"bench": "deform_attn", "geometry": kind, "batch": len(case.sizes)},
    )


def launches(case: Case, name: str, train: bool) -> int | None:
    """Calls of ops that compute something."""
    try:
        function = case.build(name)
    except Unavailable:
        return None
    with Launches() as counted:
        case.run(function, train)
    return counted.count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("kind", CASES)
def test_deform_attn(record: Callable[..., None], kind: str, train: bool, variant: str) -> None:
    record(scenario, kind, train, variant=variant)
