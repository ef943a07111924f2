"""Which images a step sees, and reading them."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import ImageSet, Sample
from .distributed import Group

if TYPE_CHECKING:
    from mixpert_kernels.hf.loading import Preprocess


_FORKS = (
    "fork" in multiprocessing.get_all_start_methods()
)  # other ways would pickle an image processor


class Skipped(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class Batch(NamedTuple):
    """The images of a batch that could be read, and those that could not."""

    indices: list[int]
    samples: list[Sample]
    pixels: Any  # (I, 3, H, W), or what preprocess gives of I images; (0,) where there is no image
    skipped: list[Skipped]


@dataclass(frozen=True)
class Order:
    """The order in which a stage sees its images: a new seeded permutation each epoch.

    Any step's batch follows from these three numbers, so a resumed run has nothing to restore but its step, and any
    number of processes agree on the batch they share.
    """

    seed: int
    stage: int
    images: int

    def batches(self, size: int, first: int = 0) -> Iterator[list[int]]:
        """Yield the indices of step ``first``, ``first + 1``, ...; a batch may span two epochs."""
        epoch, place = divmod(first * size, self.images)
        permutation = self._permutation(epoch)
        while True:
            batch: list[int] = []
            while len(batch) < size:
                taken = permutation[place : place + size - len(batch)].tolist()
                batch += taken
                place += len(taken)
                if place == self.images:
                    epoch, place = epoch + 1, 0
                    permutation = self._permutation(epoch)
            yield batch

    def batch(self, size: int, step: int) -> list[int]:
        """The indices of one step."""
        return next(self.batches(size, step))

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.stage, epoch))
        return torch.randperm(self.images, generator=generator)


def derive(seed: int, *parts: object) -> int:
    """A seed of its own for each purpose, below 2^63."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int, *parts: object) -> None:
    """Seed torch's and Python's generators from a run's seed and what it is about to do.

    Called before each step: the state of the generators follows from the step, so it needs no saving.
    """
    value = derive(seed, *parts)
    torch.manual_seed(value)
    random.seed(value)


@dataclass(frozen=True)
class Reading:
    """How a run's processes read images and compute on them.

    Attributes:
        experts: the names of the domains, by expert; or of the tasks.
        preprocess: images to pixels.
        group: the processes.
        workers: processes that decode images for each of them; 0: it does so itself.
        precision: ``fp32`` or ``bf16``.
        progress: show bars, where stderr is a terminal.
    """

    experts: Sequence[str]
    preprocess: Preprocess
    group: Group
    workers: int = 0
    precision: str = "fp32"
    progress: bool = False

    def batches(self, images: ImageSet, wanted: Iterable[list[int]]) -> Iterator[Batch]:
        """Decode and preprocess the images of each list of indices in turn."""
        return iter(
            DataLoader(
                _Reader(images, self.preprocess),
                batch_sampler=wanted,  # any iterable of lists serves
                num_workers=self.workers,
                collate_fn=_as_it_is,
                multiprocessing_context="fork" if self.workers and _FORKS else None,
                generator=torch.Generator().manual_seed(0),  # leaves the default generator alone
            )
        )

    def domains(self, samples: Sequence[Sample]) -> Tensor:
        """The samples' experts (I,), int64."""
        return torch.tensor([self.experts.index(s.domain) for s in samples], dtype=torch.int64)

    def blank(self) -> Any:
        """What ``preprocess`` makes of an empty image."""
        from PIL import Image

        return self.preprocess([Image.new("RGB", (8, 8))])

    def autocast(self) -> torch.autocast:
        on = self.precision == "bf16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=on)

    def bar(self, items: Iterable, title: str, total: int, done: int = 0) -> tqdm:
        """A progress bar over ``items``, shown by the first process."""
        hidden = None if self.progress and self.group.first else True
        return tqdm(items, title, total, initial=done, disable=hidden, leave=False)


class _Reader(Dataset):
    """Reads a whole batch at a time, and reports what it cannot read."""

    def __init__(self, images: ImageSet, preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __getitems__(self, indices: list[int]) -> Batch:
        kept, pixels, skipped = [], [], []
        for index in indices:
            try:
                image = self.images.open(index)
            except ValueError as error:
                reason = str(error).partition("got: ")[2]
                skipped.append(Skipped(self.images.samples[index].name, reason))
                continue
            kept.append(index)
            pixels.append(self.preprocess([image]))
        samples = [self.images.samples[index] for index in kept]
        return Batch(kept, samples, _joined(pixels) if pixels else torch.empty(0), skipped)


def _joined(parts: list[Any]) -> Any:
    """Several images' tensors, or tables of tensors, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _as_it_is(batch: Any) -> Any:
    return batch
