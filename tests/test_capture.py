"""CapturedTower without a GPU: a recorder that runs the function again in place of replaying a CUDA graph.

What is tested is all but the graph itself: which graph serves a batch, how it is padded, what is dropped, and what is
refused. tests/gpu/test_graphs.py has the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from _towers import EXPERTS, KINDS, OUT, make, pixels, reference_only, refused
from torch import nn

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.hf import MixpertOutput
from mixpert_kernels.hf.capture import CapturedTower, Size

SIZE = KINDS["siglip"].size
STATIC = ("last_hidden_state", "expert", "router_scores")


class Rerun:
    """Replays by running again and writing to the same outputs; keeps count, as a graph cannot."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.turns = 0

    def record(
        self, run: Callable[[], MixpertOutput]
    ) -> tuple[MixpertOutput, Callable[[], object]]:
        outputs = run()

        def replay() -> None:
            assert not torch.is_grad_enabled()
            again = run()
            self.batches.append(len(again.last_hidden_state))
            for name in STATIC:
                if getattr(outputs, name) is not None:
                    outputs[name].copy_(again[name])

        return outputs, replay

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield


@pytest.fixture(autouse=True)
def bitwise(monkeypatch) -> None:
    """The backend whose results do not depend on a tile's neighbours."""
    reference_only(monkeypatch)


@pytest.fixture(scope="module")
def tower() -> FusedMixpertTower:
    return make("siglip")


def captured(tower: FusedMixpertTower, sizes: list, **options: object) -> CapturedTower:
    options.setdefault("recorder", Rerun())
    return tower.capture(sizes, **options)


def assert_same(got: MixpertOutput, want: MixpertOutput) -> None:
    for name in STATIC:
        if getattr(want, name) is None:
            assert getattr(got, name) is None
        else:
            assert torch.equal(got[name], want[name]), name


@torch.no_grad()
def test_every_batch_up_to_the_largest_gives_what_the_tower_gives(tower) -> None:
    recorder = Rerun()
    fast = captured(tower, [4, 1, 2, 4], recorder=recorder)
    assert fast.sizes == [Size(1), Size(2), Size(4)]
    routes = set()
    for seed, batch in enumerate((1, 3, 2, 4, 1, 3)):
        images = pixels(batch, SIZE, seed)
        got = fast(images)
        assert_same(got, tower(images))
        assert got.last_hidden_state.shape == (batch, 9, OUT)
        routes |= set(got.expert.tolist())
    assert recorder.batches == [1, 4, 2, 4, 1, 4] and recorder.turns == 6
    assert len(routes) > 1


@torch.no_grad()
def test_dead_tiles_leave_no_trace(tower) -> None:
    """Not even when they hold an earlier call's NaN."""
    fast, images = captured(tower, [3]), pixels(2, SIZE)
    fast(torch.full((3, 3, *SIZE), torch.nan))
    assert_same(fast(images), tower(images))


@torch.no_grad()
def test_results_are_copies_unless_views_are_asked_for(tower) -> None:
    fast, images = captured(tower, [2]), pixels(2, SIZE)
    kept, viewed = fast(images), fast(images, copy=False)
    other = fast(pixels(2, SIZE, 9))
    assert_same(kept, tower(images))
    assert_same(viewed, other)
    assert not torch.equal(viewed.last_hidden_state, kept.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("output_router", [True, False])
def test_forced_routes_are_captured_for_themselves(tower, output_router: bool) -> None:
    fast = captured(tower, [4], forced=True, output_router=output_router)
    for routes in ([2, 0, 1], [1, 1, 1, 1], [0], [2, 2]):
        images, expert = pixels(len(routes), SIZE), torch.tensor(routes)
        got = fast(images, expert=expert)
        assert_same(got, tower(images, expert=expert, output_router=output_router))
    refused(lambda: fast(pixels(1, SIZE)), "expert must be given", "forced=True")
    refused(lambda: fast(pixels(1, SIZE), expert=torch.tensor([EXPERTS])), "expert must lie in")
    refused(lambda: fast(pixels(2, SIZE), expert=torch.tensor([0])), "one entry an image")
    unforced = captured(tower, [1])
    refused(lambda: unforced(pixels(1, SIZE), expert=torch.tensor([0])), "expert must be None")


@torch.no_grad()
@pytest.mark.parametrize("forced", [False, True])
def test_tiles_of_images(tower, forced: bool) -> None:
    """Dead tiles are dead images, or belong to the last image, dead or not: whatever there are enough of."""
    recorder = Rerun()
    fast = captured(tower, [(3, 1), (6, 3), 2], forced=forced, recorder=recorder)
    cases = [
        ([0, 0], None, 3),
        ([0, 0, 0], [2], 3),
        ([0, 1, 1], [0, 2], 6),  # 1 dead image, 3 dead tiles
        ([0, 1, 1, 1], [0, 3], 6),
        ([0, 0, 0, 1, 1], [1, 4], 6),  # 1 dead image, 1 dead tile
        ([0, 1, 2], None, 6),  # none dead, 3 dead tiles
        ([0, 0, 1, 1, 2, 2], [1, 2, 5], 6),
        ([0, 0, 0, 0], [3], 6),  # 2 dead images, 2 dead tiles
    ]
    for seed, (image_of_tile, base_tile, size) in enumerate(cases):
        tiles = pixels(len(image_of_tile), SIZE, seed)
        call = {"image_of_tile": torch.tensor(image_of_tile)}
        if base_tile is not None:
            call["base_tile"] = torch.tensor(base_tile)
        if forced:
            call["expert"] = torch.arange(image_of_tile[-1] + 1).flip(0)
        got = fast(tiles, **call)
        assert_same(got, tower(tiles, **call))
        assert recorder.batches[-1] == size
    if not forced:
        assert_same(fast(tiles[:2]), tower(tiles[:2]))
        assert recorder.batches[-1] == 2


@pytest.mark.parametrize(
    ("size", "tiles", "images", "fits"),
    [
        (Size(4), 4, None, True),
        (Size(4), 5, None, False),
        (Size(4), 2, 1, False),
        (Size(4, 2), 2, None, False),
        (Size(4, 2), 4, 2, True),
        (Size(4, 2), 3, 1, True),
        (Size(4, 2), 4, 1, False),  # no dead tile for the dead image
        (Size(4, 2), 3, 3, False),
        (Size(4, 2), 5, 2, False),
    ],
)
def test_what_fits(size: Size, tiles: int, images: int | None, fits: bool) -> None:
    assert size.fits(tiles, images) is fits


@torch.no_grad()
def test_batches_that_do_not_fit_are_refused(tower) -> None:
    fast = captured(tower, [1, 4, (6, 2)])
    refused(lambda: fast(pixels(5, SIZE)), "fit a captured size", "1, 4, (6, 2)", "5 tiles")
    with pytest.raises(ValueError, match="got 6 tiles of 1 images"):
        fast(pixels(6, SIZE), image_of_tile=torch.zeros(6, dtype=torch.int64))
    refused(lambda: fast(pixels(1, (38, 38))), "size")
    refused(lambda: fast(pixels(1, SIZE)[:, :2]), "3 channels")
    refused(lambda: fast(pixels(2, SIZE), base_tile=torch.tensor([0])), "image_of_tile")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "odd"), [("siglip", (37, 46)), ("dinov2", (42, 28))])
def test_another_image_size_is_captured_for_itself(kind: str, odd: tuple[int, int]) -> None:
    tower = make(kind)
    fast, images = captured(tower, [2], image_size=odd), pixels(1, odd)
    assert_same(fast(images), tower(images, interpolate_pos_encoding=True))
    refused(lambda: fast(pixels(1, KINDS[kind].size)), "captured size", str(odd))


@torch.no_grad()
def test_a_model_without_a_size_needs_one() -> None:
    tower = make("siglip2")
    refused(lambda: captured(tower, [1]), "image_size must be given")
    fast, images = captured(tower, [2], image_size=(32, 32)), pixels(1, (32, 32))
    assert_same(fast(images), tower(images))


@pytest.mark.parametrize(
    "sizes", [[], 4, None, [0], [-1], [1.0], ["2"], [True], [(2, 3)], [(2, 0)], [(1, 1, 1)]]
)
def test_wrong_batch_sizes_are_refused(tower, sizes: object) -> None:
    refused(lambda: captured(tower, sizes), "capture: batch_sizes must hold integers")


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"^capture: needs a CUDA device, and the tower is on "):
        make("siglip").to("meta" if torch.cuda.is_available() else "cpu").capture([1])


def test_gradients_training_and_autocast_are_refused() -> None:
    tower = make("siglip")
    fast, images = captured(tower, [1]), pixels(1, SIZE)
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        fast(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="autocast"):
            fast(images)
        again = captured(tower, [1])
    with torch.inference_mode():
        assert_same(again(images), tower(images))
    tower.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match="training mode"):
        fast(images)
    with pytest.raises(RuntimeError, match="training mode"):
        captured(tower, [1])


def test_a_capture_made_in_inference_mode_serves_outside_it() -> None:
    tower = make("siglip")
    images = pixels(1, SIZE)
    with torch.inference_mode():
        fast = captured(tower, [(2, 1), 2])
    with torch.no_grad():
        assert_same(fast(images), tower(images))
        fast(images, image_of_tile=torch.tensor([0]))


def _replace(tower: FusedMixpertTower) -> None:
    owner = tower.experts[0].block.mlp.fc1
    owner.weight = nn.Parameter(owner.weight.detach().clone())


def _move(tower: FusedMixpertTower) -> None:
    owner = tower.trunk.encoder.layers[1].layer_norm2
    owner.bias.data = owner.bias.data.clone()


def _wrap(tower: FusedMixpertTower) -> None:
    block = tower.trunk.encoder.layers[0]
    block.layer_norm1 = nn.Sequential(block.layer_norm1)


def _convert(tower: FusedMixpertTower) -> None:
    tower.to(torch.float64).to(torch.float32)


def _buffer(tower: FusedMixpertTower) -> None:
    owner = tower.trunk.embeddings
    owner.position_ids = owner.position_ids.clone()


def _strategy(tower: FusedMixpertTower) -> None:
    tower.config.routing, tower.config.tau = "score_threshold", 0.9


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_replace, "experts.0.block.mlp.fc1.weight was replaced or moved"),
        (_move, "trunk.encoder.layers.1.layer_norm2.bias was replaced or moved"),
        (_wrap, "trunk.encoder.layers.0.layer_norm1 was replaced"),
        (_convert, "was replaced or moved"),
        (_buffer, "position_ids was replaced or moved"),
        (_strategy, "the routing strategy has changed"),
    ],
)
def test_a_tower_changed_since_is_refused(change: Callable, named: str) -> None:
    tower = make("siglip")
    fast, images = captured(tower, [1]), pixels(1, SIZE)
    fast(images)
    change(tower)
    with pytest.raises(RuntimeError, match="capture the tower again") as caught:
        fast(images)
    assert named in str(caught.value)
    assert_same(captured(tower, [1])(images), tower(images))


@torch.no_grad()
def test_weights_changed_in_place_are_used() -> None:
    tower, other = make("siglip"), make("siglip", seed=5)
    fast, images = captured(tower, [2]), pixels(2, SIZE)
    before = fast(images)
    tower.load_state_dict(other.state_dict())
    assert_same(fast(images), other(images))
    assert not torch.equal(fast(images).last_hidden_state, before.last_hidden_state)
