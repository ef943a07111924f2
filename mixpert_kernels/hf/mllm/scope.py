"""The vision scope: what is known of the images while a model computes their features, and the one routing of them.

Opened around ``get_image_features`` and ``get_video_features``, or around the vision tower's forward where that is
called alone. The first expert block that runs in it routes; the blocks after it and the projector use that routing. A
block passes the routing on to its own forward as an argument, so that a block run again in backward (gradient
checkpointing) sees the routing it was first run with.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixpert_kernels import ops
from mixpert_kernels.hf.inputs import check_forced, resolve_images
from mixpert_kernels.modules.leaves import in_place
from mixpert_kernels.routing import Routing

from .boundaries import Images, from_counts


@dataclass
class Forced:
    """What ``forced_routing`` was given, as CPU or device tensors."""

    expert: Tensor | None  # 0-dimensional: one for all images
    video_expert: Tensor | None
    image_of_tile: Tensor | None
    base_tile: Tensor | None


@dataclass
class Record:
    """The routing of one call of the vision tower.

    Attributes:
        modality: ``image`` or ``video``.
        routing: of the tiles (a video's frames are tiles).
        images: which tiles are of one image.
    """

    modality: str
    routing: Routing
    images: Images

    @property
    def expert(self) -> Tensor:
        """The expert of each image, (I,) int64."""
        tiles, base = self.routing.expert.long(), self.images.base_tile
        return self._living(tiles if base is None else tiles[base])

    @property
    def scores(self) -> Tensor:
        """The router's probabilities for each image, (I, E)."""
        return self._living(self.routing.scores)

    def _living(self, rows: Tensor) -> Tensor:
        return rows[: int(self.images.image_of_tile[-1]) + 1] if self.images.padded else rows


class Records(Sequence[Record]):
    """The records of some calls, in their order.

    A chain: torch.compile would look at a list before it appends, and compile anew for every length.
    """

    def __init__(self) -> None:
        self._newest: tuple[Record, Any] | None = None

    def append(self, record: Record) -> None:
        self._newest = (record, self._newest)

    def _list(self) -> list[Record]:
        found, link = [], self._newest
        while link is not None:
            record, link = link
            found.append(record)
        return found[::-1]

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]


class _Stacks:
    """Of a thread: what it has open, innermost last."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.forced: list[tuple[nn.Module, Forced]] = []
        self.records: list[tuple[nn.Module, Records]] = []
        self.prompts: list[tuple[nn.Module, Tensor]] = []


class _Thread(threading.local):
    def __init__(self) -> None:
        self.stacks = _Stacks()


class _Traced:
    """torch.compile does not look into thread-local objects: it sees those of the thread that last opened something."""

    def __init__(self) -> None:
        self.stacks = _Stacks()


_thread = _Thread()
_traced = _Traced()


def _stacks() -> _Stacks:
    return _traced.stacks if torch.compiler.is_compiling() else _thread.stacks


@dataclass
class Scope:
    """One call of a vision tower.

    Attributes:
        owner: the module that holds the router.
        modality: ``image`` or ``video``.
        find: from the owner, ``given`` and the first expert block's input x (B, T, D) to the images its tiles are of;
            None: a tile is an image.
        given: the arguments that the tower's caller was called with.
        found: the images, where they are known before the tower runs.
        base: whether an image's ``first`` or ``last`` tile shows the whole of it, where the caller does not say.
    """

    owner: nn.Module
    modality: str
    find: Callable[[nn.Module, dict[str, Any], Tensor], Images] | None
    given: dict[str, Any]
    base: str
    routing: Routing | None = field(default=None, init=False)
    single: Routing | None = field(default=None, init=False)  # of the blocks without experts
    found: Images | None = field(default=None, init=False)

    def route(self, x: Tensor) -> Routing:
        """Return the scope's routing, made of trunk features x (B, T, D), or packed (R, D), by the first to ask."""
        if self.routing is None:
            forced = _innermost(_stacks().forced, self.owner)
            with _named():
                images = self._images(x, forced)
                expert = None if forced is None else self._forced(x, forced, images)
            router, settings = self.owner.mixpert_router, self.owner.mixpert_settings
            weights = in_place(router, lambda: router.weights_on(x.device))
            self.routing = ops.route(
                x,
                weights,
                settings.strategy,
                cu_seqlens=images.cu_seqlens,
                image_of_tile=images.image_of_tile,
                base_tile=images.base_tile,
                expert=expert,
                eps=router.eps,
            )
            for owner, records in _stacks().records:
                if owner is self.owner:
                    records.append(Record(self.modality, self.routing, images))
        return self.routing

    def _images(self, x: Tensor, forced: Forced | None) -> Images:
        given = None if forced is None or self.modality == "video" else forced.image_of_tile
        # How many tiles packed rows are, the boundaries alone say.
        images = self._told(x) if given is None or x.ndim == 2 else Images()
        packed = {"cu_seqlens": images.cu_seqlens}
        if given is not None:
            ids = resolve_images(given, forced.base_tile, images.tiles(x), x.device)
            images = Images(*ids, **packed)
            if forced.base_tile is None and self.base == "last":
                last = from_counts(given.bincount().tolist(), "last").base_tile
                images = images._replace(base_tile=last.to(x.device))
            return images
        if images.padded:  # made on the device, by what can make no others
            return images._replace(
                image_of_tile=images.image_of_tile.to(x.device),
                base_tile=images.base_tile.to(x.device),
            )
        told, tiles = images.image_of_tile, images.tiles(x)
        if told is not None and len(told) != tiles:
            raise ValueError(
                f"mixpertize: the sizes of the images must tell of as many tiles as there are, {tiles}, got {len(told)}"
            )
        ids = resolve_images(told, images.base_tile, tiles, x.device)
        return Images(*ids, **packed)

    def _told(self, x: Tensor) -> Images:
        if self.found is not None:
            return self.found
        return Images() if self.find is None else self.find(self.owner, self.given, x)

    def _forced(self, x: Tensor, forced: Forced, images: Images) -> Tensor | None:
        expert = forced.video_expert if self.modality == "video" else forced.expert
        if expert is None:
            return None
        rows = images.tiles(x) if images.base_tile is None else len(images.base_tile)
        expert = expert.to(x.device, non_blocking=True)
        if expert.ndim == 0:  # one for all
            return expert.expand(rows)
        living = rows
        if images.padded:  # dead images go to expert 0; how many there are is known to a CPU alone
            readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
            living = int(images.image_of_tile[-1]) + 1 if readable else len(expert)
        check_forced(expert, living, self.owner.mixpert_settings.num_experts)
        return torch.nn.functional.pad(expert, (0, rows - living))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Errors of checks that are shared with FusedMixpertTower, under this name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("FusedMixpertTower:", "mixpertize:", 1)) from None


def current(module: nn.Module) -> Scope:
    """Return the open scope.

    Raises:
        RuntimeError: there is none: ``module`` was called by itself.
    """
    scopes = _stacks().scopes
    if not scopes:
        raise RuntimeError(
            f"mixpertize: {type(module).__name__} must be called by get_image_features, get_video_features or the "
            "vision tower, which route"
        )
    return scopes[-1]


def shared(x: Tensor) -> Routing:
    """Return the routing of tiles x (B, T, D) to the one expert of a block that all share, made once a scope."""
    scope = _stacks().scopes[-1] if is_open() else None
    if scope is None:
        return Routing.single(len(x), x.device)
    if scope.single is None or len(scope.single.expert) != len(x):
        scope.single = Routing.single(len(x), x.device)
    return scope.single


def is_open() -> bool:
    return bool(_stacks().scopes)


@contextlib.contextmanager
def pushed(stack: str, entry: Any) -> Iterator[None]:
    """Have ``entry`` on top of one of this thread's stacks: ``scopes``, ``forced``, ``records`` or ``prompts``."""
    stacks = _stacks()
    if not torch.compiler.is_compiling():
        _traced.stacks = stacks
    entries = getattr(stacks, stack)
    entries.append(entry)
    try:
        yield
    finally:
        entries.pop()


def recording(entry: tuple[nn.Module, Any], on: bool) -> None:
    """Append every record of a module to ``entry``'s list from now on, in this thread, or no longer.

    Below the stack's other entries, which go as they came whenever this one does.
    """
    stacks = _traced.stacks = _stacks()
    stacks.records[:] = [other for other in stacks.records if other is not entry]
    if on:
        stacks.records.insert(0, entry)


def prompt_of(owner: nn.Module) -> Tensor | None:
    """The input_ids that ``owner`` is being run with, where it is known."""
    return _innermost(_stacks().prompts, owner)


def _innermost(stack: list[tuple[nn.Module, Any]], owner: nn.Module) -> Any:
    return next((entry for module, entry in reversed(stack) if module is owner), None)
