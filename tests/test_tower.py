"""What a tower does with the images of a batch: who is served by whom, and that nobody else notices."""

from __future__ import annotations

import pytest
import torch
from _towers import (
    EXPERTS,
    KINDS,
    assert_close,
    error,
    grouped,
    make,
    pixels,
    plain,
    projector,
    reference_only,
    routing,
    run,
    tile_by_tile,
    tower_of,
)
from torch import nn

from mixpert_kernels import FusedMixpertTower

SIZE = KINDS["siglip"].size
some_kinds = pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu", "internvl_rms"])
both_ways = pytest.mark.parametrize("way", ["fused", "substituted"])


@some_kinds
@both_ways
def test_perturbing_an_expert_changes_its_own_images_only(kind: str, way: str, monkeypatch) -> None:
    reference_only(monkeypatch)
    tower = tower_of(kind, way)
    images, routes = pixels(5, KINDS[kind].size), [0, 1, 2, 1, 0]
    before = run(tower, images, routes)

    def perturbed(parameters: list[nn.Parameter], least: float) -> None:
        saved = [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters:
                parameter[1] += torch.randn(parameter[1].shape, generator=generator)
            after = run(tower, images, routes)
            for parameter, old in zip(parameters, saved, strict=True):
                parameter.copy_(old)
        for b, expert in enumerate(routes):
            if expert == 1:
                assert error(after[b], before[b]) > least
            else:
                assert torch.equal(after[b], before[b])

    perturbed(list(grouped(tower).values()), 1e-3)
    for name, parameter in grouped(tower).items():
        assert parameter.shape[0] == EXPERTS, name
        if not name.endswith(("k_proj.bias", "key.bias")):  # it leaves a softmax as it is
            perturbed([parameter], 0.0)


@some_kinds
@both_ways
def test_mixed_batch_is_each_image_by_its_own_expert(kind: str, way: str) -> None:
    tower = tower_of(kind, way)
    images, routes = pixels(6, KINDS[kind].size), [2, 0, 2, 1, 0, 0]
    want = tile_by_tile(tower, images, routes)
    assert_close(run(tower, images, routes), want)
    alone = [run(tower, images, expert) for expert in range(EXPERTS)]
    for a in range(EXPERTS):
        for b in range(a):
            assert error(alone[a], alone[b]) > 1e-2


@both_ways
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("forced", [True, False])
def test_permuting_images_permutes_outputs(way, backend, forced, monkeypatch) -> None:
    if backend == "reference":
        reference_only(monkeypatch)
    tower = tower_of("siglip", way)
    images = pixels(7, SIZE)
    routes = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    with torch.no_grad():
        here = tower(images, expert=routes if forced else None)
        there = tower(images[order], expert=routes[order] if forced else None)
    assert len(set(here.expert.tolist())) > 1
    assert torch.equal(there.expert, here.expert[order])
    if backend == "reference" and way == "fused":
        assert torch.equal(there.last_hidden_state, here.last_hidden_state[order])
        assert torch.equal(there.router_scores, here.router_scores[order])
    assert_close(there.last_hidden_state, here.last_hidden_state[order])
    assert_close(there.router_scores, here.router_scores[order])


@some_kinds
@both_ways
def test_an_image_alone_is_as_in_a_batch(kind: str, way: str) -> None:
    tower = tower_of(kind, way)
    images = pixels(4, KINDS[kind].size)
    with torch.no_grad():
        batch = tower(images)
        for b in range(4):
            alone = tower(images[b : b + 1])
            assert alone.expert.tolist() == batch.expert[b : b + 1].tolist()
            assert_close(alone.last_hidden_state[0], batch.last_hidden_state[b])
            assert_close(alone.router_scores[0], batch.router_scores[b])


def test_segment_of_an_image_alone_is_bitwise_as_in_a_batch(monkeypatch) -> None:
    reference_only(monkeypatch)
    tower = make("siglip")
    with torch.no_grad():
        x = tower.trunk_features(pixels(4, SIZE))
        batch = tower.expert_segment(x, routing(2, 0, 1, 2))
        for b, expert in enumerate([2, 0, 1, 2]):
            assert torch.equal(tower.expert_segment(x[b : b + 1], routing(expert))[0], batch[b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["siglip", "dinov2", "internvl"])
def test_non_finite_pixels_go_to_expert_0_and_touch_nobody(kind, bad, monkeypatch) -> None:
    reference_only(monkeypatch)
    tower = make(kind)
    images = pixels(5, KINDS[kind].size)
    with torch.no_grad():
        clean = tower(images)
        victim = int((clean.expert != 0).nonzero()[0])
        images[victim, 1, 3, 4] = bad
        dirty = tower(images)
    others = [b for b in range(5) if b != victim]
    assert dirty.expert[victim] == 0
    assert dirty.expert[others].tolist() == clean.expert[others].tolist()
    assert torch.equal(dirty.last_hidden_state[others], clean.last_hidden_state[others])
    assert torch.equal(dirty.router_scores[others], clean.router_scores[others])
    assert not dirty.last_hidden_state[victim].isfinite().all()


def test_non_finite_pixels_touch_nobody_on_the_default_backend() -> None:
    tower = make("siglip")
    images = pixels(5, SIZE)
    clean = run(tower, images, [1, 0, 2, 0, 1])
    images[3] = float("nan")
    dirty = run(tower, images, [1, 0, 2, 0, 1])
    assert torch.equal(dirty[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


# Routes


def test_router_decides_by_the_pooled_trunk_features() -> None:
    tower = make("siglip")
    images = pixels(6, SIZE)
    with torch.no_grad():
        output = tower(images)
        z = tower.trunk_features(images).mean(1)
        logits = tower.router.out(tower.router.norm(z))
    assert_close(output.router_scores, logits.softmax(-1))
    assert torch.equal(output.expert, logits.argmax(-1))
    assert output.expert.dtype == torch.int64
    assert len(set(output.expert.tolist())) > 1
    assert_close(tower.router_features(images).detach(), z)
    assert_close(output.last_hidden_state, run(tower, images, output.expert.tolist()))


def test_trunk_features_are_the_hidden_state_before_the_experts() -> None:
    model = KINDS["clip"].build()
    tower = FusedMixpertTower.from_vision_model(model, projector(), expert_layers=2)
    want = plain("clip", model, pixels(2, SIZE), feature_layer=-3)
    with torch.no_grad():
        assert_close(tower.trunk_features(pixels(2, SIZE)), want)
    assert_close(
        tower.trunk_features(pixels(2, SIZE)).detach(), want
    )  # plain layers, with gradients


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"routing": "direct"}, [1, 2, 1]),
        ({"routing": "score_threshold", "tau": 0.6}, [1, 0, 0]),
        ({"routing": "score_difference", "delta": 0.15}, [1, 2, 0]),
        ({"routing": "score_difference", "delta": 0.35, "against": "versatile"}, [1, 0, 1]),
        ({"routing": "score_difference", "delta": 0.0}, [1, 2, 1]),
        ({"routing": "score_difference", "delta": 1.0}, [0, 0, 0]),
    ],
)
def test_strategies(options: dict, want: list[int]) -> None:
    tower = make("siglip", **options)
    rows = torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.15, 0.55], [0.05, 0.5, 0.45]])
    got = []
    with torch.no_grad():
        tower.router.out.weight.zero_()
        for scores in rows:
            tower.router.out.bias.copy_(scores.log())
            output = tower(pixels(1, SIZE))
            assert_close(output.router_scores[0], scores)
            got += output.expert.tolist()
    assert got == want


def test_forced_routes_still_score_unless_told_not_to() -> None:
    tower = make("siglip")
    images, expert = pixels(4, SIZE), torch.tensor([2, 2, 0, 1])
    with torch.no_grad():
        free = tower(images)
        scored = tower(images, expert=expert)
        silent = tower(images, expert=expert, output_router=False)
    assert_close(scored.router_scores, free.router_scores)
    assert scored.expert.tolist() == silent.expert.tolist() == [2, 2, 0, 1]
    assert silent.router_scores is None
    assert torch.equal(silent.last_hidden_state, scored.last_hidden_state)
    with torch.no_grad():
        quiet = tower(images, output_router=False)
    assert quiet.router_scores is None
    assert torch.equal(quiet.last_hidden_state, free.last_hidden_state)


def test_forced_routes_may_be_int32_and_do_not_touch_the_argument() -> None:
    tower, expert = make("siglip"), torch.tensor([1, 0], dtype=torch.int32)
    with torch.no_grad():
        output = tower(pixels(2, SIZE), expert=expert)
    assert output.expert.dtype == torch.int64
    assert output.expert.tolist() == expert.tolist() == [1, 0]


@pytest.mark.parametrize("base", ["first", "last"])
@both_ways
def test_all_tiles_of_an_image_follow_its_base_tile(base: str, way: str) -> None:
    tower = tower_of("siglip", way)
    counts = [1, 4, 2, 3]
    image_of_tile = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    tiles = pixels(10, SIZE, seed=4)
    ends = torch.tensor(counts).cumsum(0)
    base_tile = None if base == "first" else ends - 1
    shown = ends - torch.tensor(counts) if base == "first" else ends - 1
    with torch.no_grad():
        output = tower(tiles, image_of_tile=image_of_tile, base_tile=base_tile)
        single = tower(tiles[shown])
        everyone = tower(tiles)
    assert output.expert.tolist() == single.expert.tolist()
    assert_close(output.router_scores, single.router_scores)
    routes = output.expert[image_of_tile].tolist()
    assert routes != everyone.expert.tolist()  # tiles alone would have gone elsewhere
    assert_close(output.last_hidden_state, run(tower, tiles, routes))
    features = tower.router_features(tiles, image_of_tile, base_tile).detach()
    assert_close(features, tower.router_features(tiles[shown]).detach())


@pytest.mark.parametrize("output_router", [True, False])
def test_forced_routes_are_one_an_image_with_tiles(output_router: bool) -> None:
    tower = make("siglip")
    tiles = pixels(5, SIZE)
    image_of_tile = torch.tensor([0, 0, 1, 2, 2])
    with torch.no_grad():
        output = tower(
            tiles,
            image_of_tile=image_of_tile,
            expert=torch.tensor([2, 0, 1]),
            output_router=output_router,
        )
    assert output.expert.tolist() == [2, 0, 1]
    assert_close(output.last_hidden_state, run(tower, tiles, [2, 2, 0, 1, 1]))
    assert (output.router_scores is not None) == output_router
