"""The images of the MoME comparisons, rendered once a seed, and the questions about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import charts
from ..styles import SPLITS
from . import sentences
from .pages import HEIGHTS, LETTERS, PATCH, WIDTHS, Page, draw_page
from .scenes import CELLS, COLORS, SHAPES, SIDE, Thing, draw_scene
from .tasks import ASKED, GROUPS, KINDS, Facts, Question, ask, encode, facts_of

CHUNK = 500  # images rendered at a time
TALLEST, WIDEST = max(HEIGHTS), max(WIDTHS)  # of a page, in patches
QUESTION = 100  # keeps the random numbers of questions apart from those of images


class Part(NamedTuple):
    """The images of one kind in one split.

    Attributes:
        kind: of ``KINDS``.
        split: ``train`` or ``test``.
        size: how many.
    """

    kind: str
    split: str
    size: int

    def path(self, folder: Path, seed: int) -> Path:
        return folder / f"seed-{seed}" / f"{self.split}-{self.kind}-{self.size}.npz"


class Images(NamedTuple):
    """The images of a part.

    Attributes:
        square: (N, 64, 64, 3) uint8: each image resized to a square.
        native: (N, 48, 128, 3) uint8: pages as they are, in the upper left corner; of other kinds as ``square``.
        sizes: (N, 2) int64: H and W of ``native`` in patches.
        target: (N, H, W) int64: of a scene, which thing is at each patch and where its centre is, see ``decode``; of a
            page, which letter is at each patch; 0 is neither. Of a chart all 0.
    """

    square: np.ndarray
    native: np.ndarray
    sizes: np.ndarray
    target: np.ndarray


def facts(kind: str, split: str, seed: int, index: int) -> Facts:
    """What image ``index`` of a kind, split and seed shows."""
    return facts_of(kind, index, _rng(seed, split, KINDS.index(kind), index))


def question(group: str, kind: str, split: str, seed: int, index: int) -> Question:
    """The question of a group about image ``index``, always the same."""
    rng = _rng(seed, split, QUESTION + GROUPS.index(group), index)
    return ask(group, facts(kind, split, seed, index), rng)


def render(kind: str, split: str, seed: int, index: int) -> tuple[Image.Image, np.ndarray]:
    """Image ``index`` of a kind, split and seed, always the same, and its target."""
    rng = _rng(seed, split, KINDS.index(kind), index)
    shown = facts_of(kind, index, rng)
    if kind == "scene":
        image, cover = draw_scene(list(shown.things), rng, split)
        return image, np.array([0, *(_code(thing) for thing in shown.things)])[cover]
    if kind == "page":
        page = draw_page("".join(shown.words), rng, split)
        return page.image, _letters(page)
    image = charts.draw_chart(index % len(charts.LABELS), rng, split)
    return image, np.zeros((CELLS, CELLS), np.int64)


def _rng(seed: int, split: str, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, SPLITS.index(split), stream, index))


def _code(thing: Thing) -> int:
    """A scene's target at a thing: 1 + what it is, times the cells, + the cell of its centre; see ``decode``."""
    what = COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
    return 1 + what * CELLS**2 + thing.row * CELLS + thing.column


def decode(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a scene's targets that are not 0: what the things are, and the rows and columns of their centres."""
    what, cell = (target - 1) // CELLS**2, (target - 1) % CELLS**2
    return what, cell // CELLS, cell % CELLS


def _letters(page: Page) -> np.ndarray:
    """Which large letter is at the centre of each patch: 0 none, else 1 + its number."""
    width, height = (side // PATCH for side in page.image.size)
    target = np.zeros((height, width), np.int64)
    for row in range(height):
        if not page.top <= (row + 0.5) * PATCH <= page.bottom:
            continue
        for letter, left, right in page.letters:
            for column in range(width):
                if left <= (column + 0.5) * PATCH < right:
                    target[row, column] = 1 + LETTERS.index(letter)
    return target


def render_part(folder: Path, part: Part, seed: int) -> Iterator[int]:
    """Render a part into its file, yielding how many images came to be; nothing if it is there already."""
    path = part.path(folder, seed)
    if path.is_file():
        yield part.size
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    n, page = part.size, part.kind == "page"
    height, width = (TALLEST, WIDEST) if page else (CELLS, CELLS)
    square = np.zeros((n, SIDE, SIDE, 3), np.uint8)
    native = np.zeros((n, PATCH * height, PATCH * width, 3) if page else (0,), np.uint8)
    sizes = np.full((n, 2), CELLS)
    target = np.zeros((n, height, width), np.int16)
    for i in range(n):
        image, places = render(part.kind, part.split, seed, i)
        if page:
            native[i, : image.height, : image.width] = np.asarray(image)
            sizes[i] = places.shape
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        square[i] = np.asarray(image)
        target[i, : places.shape[0], : places.shape[1]] = places
        if (i + 1) % CHUNK == 0:
            yield CHUNK
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with open(draft, "wb") as file:
        np.savez(file, square=square, native=native, sizes=sizes, target=target)
    os.replace(draft, path)
    yield n % CHUNK


def load(folder: Path, part: Part, seed: int) -> Images:
    """The images of a part that ``render_part`` wrote."""
    with np.load(part.path(folder, seed)) as file:
        square, native = file["square"], file["native"]
        target = file["target"].astype(np.int64)
        return Images(square, native if native.size else square, file["sizes"], target)


class Questions(NamedTuple):
    """Questions of one group.

    Attributes:
        image: (N,) int64: which image, by its place among those of all kinds of a split.
        ids: (N, LENGTH) int64: instruction and answer.
        labels: (N, LENGTH) int64: the answer, -100 elsewhere.
        instruction: (N, 384) float32: the instructions' embeddings.
        kind: (N,) int64: the kind of image, by its place in ``KINDS``.
    """

    image: Tensor
    ids: Tensor
    labels: Tensor
    instruction: Tensor
    kind: Tensor

    def select(self, index: Tensor | slice) -> Questions:
        """Some of the questions."""
        return Questions(*(tensor[index] for tensor in self))


def questions(group: str, parts: list[Part], seed: int) -> Questions:
    """All questions of a group about the images of a split, one an image.

    Args:
        group: of ``GROUPS``.
        parts: the split's, in the order in which their images are counted.
        seed: of the run.
    """
    image: list[int] = []
    kinds: list[int] = []
    asked: list[Question] = []
    first = 0
    for part in parts:
        if part.kind in ASKED[group]:
            image += range(first, first + part.size)
            kinds += [KINDS.index(part.kind)] * part.size
            asked += [question(group, part.kind, part.split, seed, i) for i in range(part.size)]
        first += part.size
    ids, labels = zip(*(encode(q) for q in asked), strict=True)
    return Questions(
        torch.tensor(image),
        torch.tensor(ids),
        torch.tensor(labels),
        sentences.embed([q.instruction for q in asked]),
        torch.tensor(kinds),
    )
