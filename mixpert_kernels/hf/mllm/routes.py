"""Routes from outside: forced on a model's calls, or collected from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from mixpert_kernels.routing import check_ids

from .mixpertize import owner_of
from .scope import Forced, Record, Records, pushed

CALL = "forced_routing"
Ids = Sequence[int | str] | Tensor


@contextlib.contextmanager
def forced_routing(
    model: nn.Module,
    expert: int | str | Ids | None = None,
    *,
    video_expert: int | str | Ids | None = None,
    image_of_tile: Sequence[int] | Tensor | None = None,
    base_tile: Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Decide, for the calls of ``model`` in this block and thread, routes or which tiles are of one image.

    Args:
        model: a mixpertized model, also inside PEFT's, DDP's or torch.compile's.
        expert: of each image, (I,), in the order of the prompts; one for all of them; None: the router decides.
            Numbers or names of ``expert_names``.
        video_expert: the same for videos.
        image_of_tile: (B,) ascending from 0 without gaps: the image each tile is a crop of. None: as the family's
            inputs tell. For Gemma 3's crops, and for InternVL's and SmolVLM's frames of a video to share a route.
        base_tile: (I,): the tile that shows the whole image; default the family's own, first or last.

    Raises:
        ValueError: the model has no experts, or a value is of the wrong type or out of range.

    Example:
        >>> with forced_routing(model, expert=[0, 2]):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    owner = owner_of(CALL, model)
    settings = owner.mixpert_settings

    def one(name: str, given: int | str) -> int:
        if isinstance(given, str):
            names = settings.expert_names or []
            if given not in names:
                raise ValueError(f"{CALL}: {name} must be one of {names}, got {given}")
            return names.index(given)
        if type(given) is bool or not isinstance(given, Integral):
            kind = type(given).__name__
            raise ValueError(f"{CALL}: {name} must be numbers or names, got {kind} {given}")
        if not 0 <= given < settings.num_experts:
            last = settings.num_experts - 1
            raise ValueError(f"{CALL}: {name} must lie in 0..{last}, got {given}")
        return int(given)

    def ids(name: str, given: int | str | Ids | None) -> Tensor | None:
        if given is None:
            return None
        if isinstance(given, Tensor):
            check_ids(CALL, name, given if given.ndim else given[None], settings.num_experts)
            return given.long()
        if isinstance(given, str) or not isinstance(given, Iterable):
            return torch.tensor(one(name, given))
        return torch.tensor([one(name, entry) for entry in given], dtype=torch.int64)

    if base_tile is not None and image_of_tile is None:
        raise ValueError(f"{CALL}: base_tile must come with image_of_tile, got it alone")
    forced = Forced(
        ids("expert", expert),
        ids("video_expert", video_expert),
        _tensor(image_of_tile),
        _tensor(base_tile),
    )
    with pushed("forced", (owner, forced)):
        yield


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[Sequence[Record]]:
    """Collect the routings of ``model`` in this block and thread: one ``Record`` a call of the vision tower.

    Raises:
        ValueError: the model has no experts.

    Example:
        >>> with record_routing(model) as records:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> records[0].expert, records[0].scores  # doctest: +SKIP
    """
    owner = owner_of("record_routing", model)
    records = Records()
    with pushed("records", (owner, records)):
        yield records


def _tensor(given: Sequence[int] | Tensor | None) -> Tensor | None:
    return given if given is None or isinstance(given, Tensor) else torch.tensor(given)
