"""CUDA graphs of a tower: one host call a batch, where launching its kernels one by one takes longer than running them.

A graph replays fixed kernels on fixed memory. A tower's kernels don't depend on the routing, so one graph a batch size
serves every routing; batches in between are padded with dead tiles, whose results are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .cuda_graph import CudaRecorder, Recorder
from .inputs import check_forced, pair, resolve_images
from .outputs import MixpertOutput

if TYPE_CHECKING:
    from .tower import FusedMixpertTower


class Size(NamedTuple):
    """What one graph serves: up to ``tiles`` tiles; ``images`` None: each an image of its own."""

    tiles: int
    images: int | None = None

    def fits(self, tiles: int, images: int | None) -> bool:
        """Whether a batch can be padded to this size: every dead image needs a dead tile."""
        if images is None or self.images is None:
            return images is self.images and tiles <= self.tiles
        return 0 <= self.images - images <= self.tiles - tiles


class CapturedTower:
    """A tower in CUDA graphs, called as the tower is; made by ``FusedMixpertTower.capture``.

    Results are, bit for bit, those of the tower called with the padded batch; so an image's are those it gets in any
    batch wherever the tower's own do not depend on the batch. The memory of the graphs and of their inputs and outputs
    is held as long as this object is.

    Weights changed in place (an optimizer's step, ``load_state_dict``) are used by the next call. Parameters, buffers
    or modules that were replaced or moved, or another routing strategy, make every call an error: capture again.

    Calls may come from any thread and any stream: they take turns, on the host by a lock and on the device by an event.

    Args:
        tower: in eval mode, on a CUDA device.
        batch_sizes: one graph for each entry: ``n`` for up to n tiles, each an image of its own; ``(n, i)`` for up to n
            tiles of up to i images (AnyRes), to be called with ``image_of_tile``.
        forced: capture for calls with ``expert`` (teacher routing) instead of the router's decision.
        output_router: as in the tower's forward.
        image_size: (H, W) of the pixels; None: the vision model's own.
        recorder: what records and replays; None: CUDA graphs.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: no CUDA device, or a tower in training mode.

    Example:
        >>> fast = tower.cuda().eval().capture([1, 4, 16])  # doctest: +SKIP
        >>> with torch.no_grad():  # doctest: +SKIP
        ...     fast(pixel_values).last_hidden_state  # any batch of up to 16 images
    """

    def __init__(
        self,
        tower: FusedMixpertTower,
        batch_sizes: Sequence[int | tuple[int, int]],
        *,
        forced: bool = False,
        output_router: bool = True,
        image_size: int | tuple[int, int] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.sizes = _sizes(batch_sizes)
        self._tower, self._forced, self._output_router = tower, forced, output_router
        if recorder is None and tower.device.type != "cuda":
            raise RuntimeError(f"capture: needs a CUDA device, and the tower is on {tower.device}")
        self._check_eval()
        own = getattr(tower.config.vision_config, "image_size", None)
        image_size = own if image_size is None else image_size
        if image_size is None:
            raise ValueError(
                "capture: image_size must be given for a vision model without one, got None"
            )
        self._interpolate = own is not None and pair(image_size) != pair(own)
        self._recorder = CudaRecorder(tower.device) if recorder is None else recorder
        self._allocate(pair(image_size))
        self._graphs = {size: self._record(size) for size in reversed(self.sizes)}
        self._parts = _Parts(tower)

    def __call__(
        self,
        pixel_values: Tensor,  # (B, C, H, W)
        *,
        image_of_tile: Tensor | None = None,  # (B,)
        base_tile: Tensor | None = None,  # (I,)
        expert: Tensor | None = None,  # (I,)
        copy: bool = True,
    ) -> MixpertOutput:
        """Encode a batch: the tower's forward, replayed in the smallest graph that the batch fits.

        Args:
            pixel_values: (B, C, H, W) floating point, on the tower's device, of the captured image size.
            image_of_tile: as in the tower's forward; given exactly for sizes captured as (tiles, images).
            base_tile: as in the tower's forward.
            expert: (I,) integers, given exactly when captured with ``forced``.
            copy: return tensors of their own; False: views of the graph's outputs, which the next call overwrites.

        Raises:
            ValueError: an argument is not what the tower takes, or the batch fits no captured size.
            RuntimeError: gradients or autocast are enabled, the tower is in training mode, or it was changed since.
        """
        self._check_state()
        self._tower._check_pixels(pixel_values, self._interpolate)
        if pixel_values.shape[2:] != self._pixels.shape[2:]:
            raise ValueError(
                f"capture: pixel_values must have the captured size, {tuple(self._pixels.shape[2:])}, "
                f"got {tuple(pixel_values.shape[2:])}"
            )
        tiles = pixel_values.shape[0]
        maps = resolve_images(image_of_tile, base_tile, tiles, self._tower.device)
        images = tiles if maps[1] is None else maps[1].shape[0]
        size = self._choose(tiles, None if maps[1] is None else images)
        if (expert is not None) != self._forced:
            raise ValueError(
                f"capture: expert must be {'given' if self._forced else 'None'}, as captured "
                f"(forced={self._forced}), got {type(expert).__name__}"
            )
        if expert is not None:
            check_forced(expert, images, self._tower.config.num_experts)
        with self._recorder.turn(), torch.no_grad():
            self._load(pixel_values, *maps, expert)
            self._pad(size, tiles, images)
            outputs, replay = self._graphs[size]
            replay()
            return _first(outputs, tiles, images, copy)

    def _check_eval(self) -> None:
        if self._tower.training:
            raise RuntimeError("capture: needs a tower in eval mode, and it is in training mode")

    def _check_state(self) -> None:
        self._check_eval()
        if torch.is_grad_enabled():
            raise RuntimeError("capture: a replay has no gradients: call it under torch.no_grad()")
        if torch.is_autocast_enabled(self._pixels.device.type):
            raise RuntimeError("capture: was recorded without autocast: convert the tower instead")
        changed = self._parts.changed()
        if changed is not None:
            raise RuntimeError(f"capture: {changed} since the capture: capture the tower again")

    def _choose(self, tiles: int, images: int | None) -> Size:
        for size in self.sizes:
            if size.fits(tiles, images):
                return size
        got = f"{tiles} tiles" if images is None else f"{tiles} tiles of {images} images"
        known = ", ".join(str(s.tiles if s.images is None else tuple(s)) for s in self.sizes)
        raise ValueError(f"capture: the batch must fit a captured size, one of {known}, got {got}")

    @torch.inference_mode(False)  # tensors made in inference mode could not be written outside it
    def _allocate(self, image_size: tuple[int, int]) -> None:
        """Make the inputs that all graphs read, each the first so many rows."""
        tower = self._tower
        channels = getattr(tower.config.vision_config, "num_channels", 3)
        most = max(size.tiles for size in self.sizes)
        self._pixels = torch.zeros(
            (most, channels, *image_size), dtype=tower.dtype, device=tower.device
        )
        ids = torch.zeros(3, most, dtype=torch.int64, device=tower.device)
        self._image_of_tile, self._base_tile, self._expert = ids

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, size: Size) -> tuple[MixpertOutput, Callable[[], object]]:
        self._pad(size, 0, 0)
        with torch.autocast(self._pixels.device.type, enabled=False):
            return self._recorder.record(lambda: self._run(size))

    def _run(self, size: Size) -> MixpertOutput:
        maps = {}
        if size.images is not None:
            maps["image_of_tile"] = self._image_of_tile[: size.tiles]
            maps["base_tile"] = self._base_tile[: size.images]
        images = size.tiles if size.images is None else size.images
        return self._tower(
            self._pixels[: size.tiles],
            **maps,
            expert=self._expert[:images] if self._forced else None,
            interpolate_pos_encoding=self._interpolate,
            output_router=self._output_router,
        )

    def _load(self, pixels: Tensor, *ids: Tensor | None) -> None:
        self._pixels[: len(pixels)].copy_(pixels)
        for buffer, values in zip(
            (self._image_of_tile, self._base_tile, self._expert), ids, strict=True
        ):
            if values is not None:
                buffer[: len(values)].copy_(values, non_blocking=True)

    def _pad(self, size: Size, tiles: int, images: int) -> None:
        """Make the maps of the tiles after the first ``tiles`` valid; their pixels and experts are an earlier call's.

        The first dead tiles are the dead images, one each; any others belong to the last image, whichever it is: only
        the base tile of an image decides its route.
        """
        if size.images is None:
            return
        dead = torch.arange(tiles, size.tiles, device=self._pixels.device)
        rest = self._image_of_tile[tiles : size.tiles]
        torch.clamp(dead + (images - tiles), max=size.images - 1, out=rest)
        self._base_tile[images : size.images] = dead[: size.images - images]


class _Parts:
    """What graphs have taken over from a tower by address or by value."""

    def __init__(self, tower: FusedMixpertTower) -> None:
        self._config, self._strategy = tower.config, tower.config.strategy
        self._modules: list[tuple] = []  # (table of the owner, name in it, what was there, path)
        self._tensors: list[tuple] = []  # the same and the address
        for path, module in tower.named_modules():
            prefix = f"{path}." if path else ""
            for name, child in module._modules.items():
                self._modules.append((module._modules, name, child, prefix + name))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        held = (table, name, tensor, prefix + name, tensor.data_ptr())
                        self._tensors.append(held)

    def changed(self) -> str | None:
        """Say what has changed, if anything. Before each replay, so it is kept cheap: 0.1 us a part."""
        if self._config.strategy != self._strategy:
            return "the routing strategy has changed"
        for table, name, child, path in self._modules:
            if table.get(name) is not child:
                return f"{path} was replaced"
        for table, name, tensor, path, address in self._tensors:
            if table.get(name) is not tensor or tensor.data_ptr() != address:
                return f"{path} was replaced or moved"
        return None


def _first(outputs: MixpertOutput, tiles: int, images: int, copy: bool) -> MixpertOutput:
    """The outputs without those of dead tiles and images."""

    def taken(output: Tensor | None, count: int) -> Tensor | None:
        if output is None:
            return None
        return output[:count].clone() if copy else output[:count]

    return MixpertOutput(
        last_hidden_state=taken(outputs.last_hidden_state, tiles),
        expert=taken(outputs.expert, images),
        router_scores=taken(outputs.router_scores, images),
    )


def _sizes(batch_sizes: Sequence[int | tuple[int, int]]) -> list[Size]:
    """Check the sizes and return them from small to large, each once."""
    wanted = "hold integers of at least 1 or pairs (tiles, images) with 1 <= images <= tiles"
    if not isinstance(batch_sizes, Sequence) or not batch_sizes:
        raise ValueError(f"capture: batch_sizes must {wanted}, got {batch_sizes}")
    sizes = set()
    for entry in batch_sizes:
        numbers = tuple(entry) if isinstance(entry, tuple | list) else (entry,)
        descending = (*numbers, 1)
        if (
            len(numbers) not in (1, 2)
            or any(type(n) is not int for n in numbers)
            or any(a < b for a, b in itertools.pairwise(descending))
        ):
            raise ValueError(f"capture: batch_sizes must {wanted}, got {entry}")
        sizes.add(Size(*numbers))
    return sorted(sizes, key=lambda size: (size.tiles, size.images or 0))
