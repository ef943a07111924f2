"""The tower on a GPU: no waiting, no recompilation, an image's bits its own, CUDA graphs for any routing."""

from __future__ import annotations

import random

import pytest
import torch
from _on_gpu import (
    DEVICE,
    EXPERTS,
    backend,
    compiled_variants,
    every_dtype,
    ids,
    no_sync,
    only,
    pinned,
    pixels,
    routing,
    segment_inputs,
    tower,
)
from _towers import assert_close

from mixpert_kernels.hf import MixpertOutput

__all__ = ["backend", "no_sync", "only", "pinned"]  # fixtures
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only")]

ROUTINGS = ([0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1], [2, 2, 1, 1], [0, 0, 0, 0], [2, 1, 0, 0])
TILES = {"image_of_tile": (0, 0, 1, 1, 1), "base_tile": (1, 4)}


def same(got: MixpertOutput, want: MixpertOutput, images: int, tiles: int) -> bool:
    return (
        torch.equal(got.last_hidden_state, want.last_hidden_state[:tiles])
        and torch.equal(got.expert, want.expert[:images])
        and torch.equal(got.router_scores, want.router_scores[:images])
    )


# Nothing waits.


@pytest.mark.parametrize("tiles", [False, True], ids=["images", "tiles"])
@torch.no_grad()
def test_inference_does_not_wait(tiles: bool, request) -> None:
    made, images = tower(), pixels(5)
    call = {name: ids(*values) for name, values in TILES.items()} if tiles else {}
    made(images, **call)
    request.getfixturevalue("no_sync")
    made(images, **call)
    made(images, **call, expert=made(images, **call).expert)


def test_training_does_not_wait(request) -> None:
    made, images = tower().train(), pixels(4)

    def step() -> None:
        out = made(images)
        loss = out.last_hidden_state.float().square().mean() + out.router_scores.square().sum()
        loss.backward()
        for parameter in made.parameters():
            parameter.grad = None

    step()
    request.getfixturevalue("no_sync")
    step()


@torch.no_grad()
def test_replaying_does_not_wait(request) -> None:
    made, images = tower(), pixels(3)
    fast = made.capture([4, (4, 2)])
    call = {"image_of_tile": ids(0, 1, 1), "base_tile": ids(0, 2)}
    request.getfixturevalue("no_sync")
    fast(images)
    fast(images, **call)


# An image's bits are its own.


@every_dtype
@torch.no_grad()
def test_an_image_is_bitwise_the_same_in_any_batch(dtype: torch.dtype, pinned) -> None:
    made = tower(dtype=dtype)
    x, expert = segment_inputs(made, 7), [2, 0, 1, 0, 0, 2, 0]
    whole = made.expert_segment(x, routing(*expert))
    assert torch.equal(made.expert_segment(x, routing(*expert)), whole)
    order = ids(3, 6, 0, 5, 1, 4, 2)
    mixed = made.expert_segment(x[order], routing(*[expert[b] for b in order]))
    assert torch.equal(mixed, whole[order])
    routed = made.route(x)
    for b, e in enumerate(expert):
        assert torch.equal(made.expert_segment(x[b : b + 1], routing(e))[0], whole[b])
        alone = made.route(x[b : b + 1])
        assert torch.equal(alone.scores[0], routed.scores[b])
        assert torch.equal(alone.expert[0], routed.expert[b])


@torch.no_grad()
def test_tiles_follow_the_route_of_their_images_base_tile(pinned) -> None:
    made, images = tower(), pixels(5)
    call = {name: ids(*values) for name, values in TILES.items()}
    got = made(images, **call)
    base = made(images[call["base_tile"]])
    assert torch.equal(got.expert, base.expert)
    of_tile = got.expert[call["image_of_tile"]]
    want = made(images, expert=of_tile).last_hidden_state
    assert torch.equal(got.last_hidden_state, want)


# Compiled variants.


@torch.no_grad()
def test_no_batch_and_no_routing_compiles_anything(only: str) -> None:
    if only != "triton":
        pytest.skip(f"{only} compiles nothing")
    made, draw = tower(), random.Random(0)
    made(pixels(2))
    made(pixels(2), expert=ids(0, 1))
    count = compiled_variants()
    assert count > 0
    for batch in (1, 3, 16, *(draw.randrange(1, 70) for _ in range(6))):
        made(pixels(batch, batch))
        made(pixels(batch), expert=ids(*(draw.randrange(EXPERTS) for _ in range(batch))))
        assert compiled_variants() == count, batch


# CUDA graphs.


@every_dtype
@torch.no_grad()
def test_a_graph_serves_every_routing_and_the_batches_below_it(dtype: torch.dtype) -> None:
    made = tower(dtype=dtype)
    fast = made.capture([2, 4])
    seen = set()
    for seed, batch in enumerate((4, 3, 2, 1, 4, 3)):
        images = pixels(batch, seed, dtype)
        padded = torch.cat(
            [images, images.new_zeros(fast._choose(batch, None).tiles - batch, *images.shape[1:])]
        )
        got = fast(images)
        assert same(got, made(padded), batch, batch)
        seen.add(tuple(got.expert.tolist()))
    assert len(seen) > 3


@torch.no_grad()
def test_a_graph_of_forced_routes() -> None:
    made, images = tower(), pixels(4)
    fast = made.capture([4], forced=True)
    for routes in ROUTINGS:
        assert same(fast(images, expert=ids(*routes)), made(images, expert=ids(*routes)), 4, 4)


@torch.no_grad()
def test_a_graph_of_tiles() -> None:
    made = tower()
    fast = made.capture([(6, 3)])
    for of_tile, base in (((0, 0, 1, 1, 2, 2), (1, 2, 5)), ((0, 1, 1, 2, 2, 2), (0, 2, 3))):
        call = {"image_of_tile": ids(*of_tile), "base_tile": ids(*base)}
        assert same(fast(pixels(6), **call), made(pixels(6), **call), 3, 6)
    got = fast(pixels(4), image_of_tile=torch.tensor([0, 0, 1, 1]))
    assert got.expert.shape == (2,) and bool(got.last_hidden_state.isfinite().all())


@torch.no_grad()
def test_calls_on_other_streams_take_turns() -> None:
    made = tower()
    fast = made.capture([4])
    batches = [pixels(4, seed) for seed in range(8)]
    wanted = [fast(images) for images in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    got = []
    for images, stream in zip(batches, streams, strict=True):
        with torch.cuda.stream(stream):
            got.append(fast(images))
    torch.cuda.synchronize()
    assert all(same(g, w, 4, 4) for g, w in zip(got, wanted, strict=True))


@torch.no_grad()
def test_torch_compile_with_graphs_of_its_own() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made, images = tower(), pixels(4)
    fast = torch.compile(made, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for routes in ROUTINGS:  # the first calls record
        torch.compiler.cudagraph_mark_step_begin()
        got, want = fast(images, expert=ids(*routes)), made(images, expert=ids(*routes))
        assert_close(got.last_hidden_state.float(), want.last_hidden_state.float(), 2e-2)
        assert got.expert.tolist() == routes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert next(made.parameters()).device.type == DEVICE.type
    torch._dynamo.reset()
