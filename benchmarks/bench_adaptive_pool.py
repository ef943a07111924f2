"""adaptive_pool of images of one size and of many: a matter of memory traffic and of launches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, DTYPE, SIZE, Scenario, Unavailable, Variant
from torch import Tensor

from mixpert_kernels import Grids, ops
from mixpert_kernels.backends import BACKENDS, why_not

# Pix2Struct's patches, at most 2048 an image: documents, photos, a banner of one row.
DOCUMENTS = [(53, 38), (45, 45), (32, 64), (64, 31), (1, 2048), (26, 78), (12, 170), (40, 51)]
DINOV2, PIX2STRUCT = 1024, 768
CASES = {
    "ci": {"ragged": ([(9, 7), (1, 40), (16, 16)], 64)},
    "default": {"same": ([(32, 32)] * 8, DINOV2), "ragged": (DOCUMENTS, PIX2STRUCT)},
    "full": {
        "one": ([(32, 32)], DINOV2),
        "same": ([(32, 32)] * 32, DINOV2),
        "ragged": (DOCUMENTS * 4, PIX2STRUCT),
    },
}[SIZE]
OURS = tuple(f"ours_{backend}" for backend in BACKENDS)
OTHERS = ("loop", "loop_of_copies", "matrices")
Sizes = list[tuple[int, int]]


def loop(x: Tensor, sizes: Sizes, copy: bool = False) -> Tensor:
    """PyTorch's pooling, image by image; on the rows as they lie, or with each channel's plane copied together."""
    images = (
        rows.view(h, w, -1).permute(2, 0, 1)[None]
        for rows, (h, w) in zip(x.split([h * w for h, w in sizes]), sizes, strict=True)
    )
    images = (image.contiguous() for image in images) if copy else images
    return torch.cat([F.adaptive_avg_pool2d(image, 16).flatten(2).mT for image in images])


def weights(cells: int) -> Tensor:
    """(16, cells): a row averages a bin."""
    bins = torch.arange(16)[:, None]
    first, end = bins * cells // 16, ((bins + 1) * cells + 15) // 16
    inside = (torch.arange(cells) >= first) & (torch.arange(cells) < end)
    return (inside / inside.sum(1, keepdim=True)).to(DEVICE, DTYPE)


def matrices(x: Tensor, sizes: Sizes) -> Callable[[], Tensor]:
    """Each image between two matrices, made beforehand: over its rows, then over its columns."""
    made = [(weights(h), weights(w)) for h, w in sizes]
    rows = [h * w for h, w in sizes]

    def call() -> Tensor:
        pooled = []
        for image, (over_rows, over_columns), (h, _) in zip(
            x.split(rows), made, sizes, strict=True
        ):
            half = (over_rows @ image.view(h, -1)).view(16, -1, x.shape[1])
            pooled.append((over_columns @ half).flatten(0, 1))
        return torch.stack(pooled)

    return call


def scenario(kind: str) -> Scenario:
    sizes, channels = CASES[kind]
    rows = sum(h * w for h, w in sizes)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    grids = Grids.of(sizes, DEVICE)

    def ours(backend: str) -> Callable[[], Tensor]:
        reason = why_not("adaptive_pool", backend, device=DEVICE, dtype=DTYPE)
        if reason is not None:
            raise Unavailable(reason)
        return lambda: ops.adaptive_pool(x, grids, backend=backend)

    others = {
        "loop": lambda: lambda: loop(x, sizes),
        "loop_of_copies": lambda: lambda: loop(x, sizes, copy=True),
        "matrices": lambda: matrices(x, sizes),
    }
    return Scenario(
        name=f"adaptive_pool ({channels}), {len(sizes)} images, {kind}",
        truth=lambda: loop(x.float(), sizes),
        base="loop",
        variants=(
            *(Variant(f"ours_{b}", functools.partial(ours, b)) for b in BACKENDS),
            *(Variant(name, build) for name, build in others.items()),
        ),
        moved=float(x.nbytes + len(sizes) * 256 * channels * x.element_size()),
        info={
            "bench": "adaptive_pool",
            "geometry": f"{channels}",
            "batch": len(sizes),
            "route": kind,
        },
    )


@pytest.mark.parametrize("variant", [*OURS, *OTHERS])
@pytest.mark.parametrize("kind", CASES)
def test_adaptive_pool(record: Callable[..., None], kind: str, variant: str) -> None:
    record(scenario, kind, variant=variant)
