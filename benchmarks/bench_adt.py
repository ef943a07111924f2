"""AdaptiveDeformableTransform, forward and a training step, on images of one size and on ragged ones.

Against the same module written with a loop over the images around `grid_sample` (`image_loop`; `naive_loop` runs all of
it image by image, as the original does), and against transformers' Deformable-DETR decoder layers where all images have
one size. Features are a frozen encoder's and ask for no gradient. `ops` is how many calls of ops compute something; one
of this library is one launch, or two for `grouped_mlp`, on a GPU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import _adt_baselines as baselines
import pytest
import torch
from _harness import DEVICE, DTYPE, SIZE, Output, Scenario, Unavailable, Variant
from torch import Tensor

from mixpert_kernels import Grids
from mixpert_kernels.modules import AdaptiveDeformableTransform
from mixpert_kernels.testing import randomize_


class Geometry(NamedTuple):
    """The sizes of a transform and of the images of a batch."""

    name: str
    width: int
    layers: int
    ffn: int
    side: int
    sizes: tuple[tuple[int, int], ...]


RAGGED = ((45, 45), (1, 2048), (64, 31), (12, 100))
GEOMETRIES = {
    "ci": [
        Geometry("uniform", 32, 2, 32, 4, ((6, 6),) * 2),
        Geometry("ragged", 32, 2, 32, 4, ((7, 5), (1, 40))),
    ],
    "default": [
        Geometry("uniform", 256, 3, 512, 16, ((24, 24),) * 8),
        Geometry("ragged", 256, 3, 512, 16, RAGGED * 2),
    ],
    "full": [
        Geometry("DINOv2-L, 32 x 32", 1024, 6, 1024, 16, ((32, 32),) * 2),
        Geometry("Pix2Struct-base, ragged", 768, 6, 1024, 16, RAGGED),
    ],
}[SIZE]
VARIANTS = ("ours", "image_loop", "naive_loop", "transformers")


class Case:
    """The module and the features of one geometry, and each variant as a method that builds its forward pass."""

    def __init__(self, geometry: Geometry) -> None:
        _, width, layers, ffn, side, sizes = geometry
        adt = AdaptiveDeformableTransform(width, layers=layers, ffn=ffn, size=side)
        fresh = adt.reference_points.detach().clone()
        randomize_(adt).reference_points.data.copy_(fresh)
        self.adt = adt.eval().to(DEVICE, DTYPE)
        self.exact = copy.deepcopy(self.adt).float()
        self.sizes = list(sizes)
        rows = sum(height * w for height, w in sizes)
        generator = torch.Generator().manual_seed(0)
        self.f = torch.randn(rows, width, generator=generator).to(DEVICE, DTYPE)

    def ours(self) -> Callable[[], Tensor]:
        grids = Grids.of(self.sizes, DEVICE)
        return lambda: self.adt(self.f, grids)

    def image_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.image_loop(self.adt, self.f, self.sizes)

    def naive_loop(self) -> Callable[[], Tensor]:
        return lambda: baselines.naive_loop(self.adt, self.f, self.sizes)

    def transformers(self) -> Callable[[], Tensor]:
        if len(set(self.sizes)) > 1:
            raise Unavailable("its images have one size")
        forward = baselines.transformers_layers(self.adt)
        return lambda: forward(self.f, self.sizes)

    def ops(self, name: str, train: bool) -> int | None:
        try:
            forward = getattr(self, name)()
        except Unavailable:
            return None
        with baselines.Launches() as launches, torch.no_grad():
            self.run(forward, train)
        return launches.count

    def truth(self) -> Tensor:
        return baselines.image_loop(self.exact, self.f.float(), self.sizes)

    def run(self, forward: Callable[[], Tensor], train: bool, exact: bool = False) -> Output:
        """The output; in training the gradient of the last MLP's weight too, which hangs on no sample's position.

        Others do, and grid_sample rounds positions: in an image 2048 wide to 1e-4 of a patch, which makes 1e-3 of the
        gradients of what is before. tests/test_adt.py checks them all.
        """
        if not train:
            return forward()
        adt = self.exact if exact else self.adt
        checked = f"layers.{len(adt.layers) - 1}.fc2.weight"
        with torch.enable_grad():
            y = forward()
            dy = torch.ones_like(y)
            dy[..., ::2] = -0.5  # not the same everywhere: sums would cancel in LayerNorms
            names = [name for name, _ in adt.named_parameters()]
            gradients = torch.autograd.grad(y, list(adt.parameters()), dy)
        return y.detach(), gradients[names.index(checked)][None]


@functools.lru_cache(maxsize=1)
def setup(geometry: Geometry) -> Case:
    return Case(geometry)


def scenario(geometry: Geometry, train: bool) -> Scenario:
    case = setup(geometry)

    def variant(name: str) -> Variant:
        def build() -> Callable[[], Output]:
            forward = getattr(case, name)()
            return lambda: case.run(forward, train)

        return Variant(name, build, info={"ops": case.ops(name, train)})

    return Scenario(
        name=f"adt {geometry.name}, {'forward and backward' if train else 'forward'}, B={len(geometry.sizes)}",
        truth=lambda: case.run(case.truth, train, exact=True),
        base="image_loop",
        variants=tuple(variant(name) for name in VARIANTS),
        info={"bench": "adt", "geometry": geometry.name, "batch": len(geometry.sizes)},
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_adt(record: Callable[..., None], geometry: Geometry, train: bool, variant: str) -> None:
    record(scenario, geometry, train, variant=variant)
