"""Sharing, copying, moving: threads, deepcopy, state_dict, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from _towers import (
    KINDS,
    OUT,
    assert_close,
    error,
    make,
    pixels,
    plain,
    projector,
    randomise,
    run,
    substituted,
    tile_by_tile,
)

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.backends.cpu import native
from mixpert_kernels.hf import MixpertOutput

SIZE = KINDS["siglip"].size
some_kinds = pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu", "internvl_rms"])
both_ways = pytest.mark.parametrize("way", ["fused", "substituted"])


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_threads_keep_their_own_routes(kind: str) -> None:
    tower = substituted(make(kind))
    images = pixels(3, KINDS[kind].size)
    routes = ([0, 1, 2], [2, 2, 1])
    want = [run(tower, images, r) for r in routes]
    meet = threading.Barrier(2, timeout=60)
    # Both threads are inside the block at once: each has bound its routing, neither has read all of it.
    for module in (tower.experts[0].block, tower.experts[0].block.mlp.fc1):
        module.register_forward_pre_hook(lambda *_: [None, meet.wait()][0])
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        got[i] = run(tower, images, routes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_close(got[i], want[i])


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_model_and_projector_are_not_changed(kind: str) -> None:
    model, head = KINDS[kind].build(), projector()
    modules = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    head_state = {name: value.clone() for name, value in head.state_dict().items()}
    fields, images = copy.deepcopy(model.config.to_dict()), pixels(2, KINDS[kind].size)
    want = plain(kind, model, images)
    tower = FusedMixpertTower.from_vision_model(model, head, num_experts=2, feature_layer=-2)
    tell = [p for name, p in tower.named_parameters() if not name.startswith("trunk.")]
    with torch.no_grad():
        for parameter in tell:
            parameter.normal_()
    run(tower, images, [1, 0])
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.config.to_dict() == fields
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, head_state[name]) for name, value in head.state_dict().items())
    assert torch.equal(plain(kind, model, images), want)


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "internvl_rms", "beit"])
def test_deepcopy_is_independent(kind: str) -> None:
    tower = make(kind)
    images = pixels(2, KINDS[kind].size)
    want = run(tower, images, [1, 2])
    twin = copy.deepcopy(tower)
    assert_close(run(twin, images, [1, 2]), want)
    randomise(twin, 11)
    assert error(run(twin, images, [1, 2]), want) > 1e-2
    assert torch.equal(run(tower, images, [1, 2]), want)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    tower, other = make(kind), make(kind, seed=20)
    images = pixels(2, KINDS[kind].size)
    want = run(tower, images, [1, 2])
    assert error(run(other, images, [1, 2]), want) > 1e-2
    buffer = io.BytesIO()
    torch.save(tower.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_close(run(other, images, [1, 2]), want)


def test_output_is_a_model_output_and_pickles() -> None:
    with torch.no_grad():
        output = make("siglip")(pixels(2, SIZE))
    assert isinstance(output, MixpertOutput)
    assert list(output.keys()) == ["last_hidden_state", "expert", "router_scores"]
    assert output[0] is output.last_hidden_state
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is MixpertOutput
    assert all(torch.equal(again[key], output[key]) for key in output)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_modes_agree_with_training_mode(mode) -> None:
    tower = make("siglip")
    images, expert = pixels(4, SIZE), torch.tensor([2, 0, 1, 0])
    want = tower(images, expert=expert)
    with mode():
        got = tower(images, expert=expert)
    assert_close(got.last_hidden_state, want.last_hidden_state.detach())
    assert_close(got.router_scores, want.router_scores.detach())


def test_to_moves_everything_and_switches_dtype() -> None:
    tower = make("dinov2").to(torch.bfloat16)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    tower.to("meta")
    assert {p.device.type for p in (*tower.parameters(), *tower.buffers())} == {"meta"}


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit", "dinov3", "internvl"])
def test_pixels_of_another_float_dtype_do_as_in_transformers(kind: str) -> None:
    """float32 pixels into a bfloat16 model: image processors give float32."""
    tower = make(kind).bfloat16()
    got = run(tower, pixels(2, KINDS[kind].size), [1, 0])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, run(tower, pixels(2, KINDS[kind].size).bfloat16(), [1, 0]))


def test_autocast_is_close() -> None:
    tower = make("siglip")
    images = pixels(3, SIZE)
    want = run(tower, images, [2, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        for each in (tower, substituted(make("siglip"))):
            assert_close(run(each, images, [2, 0, 1]).float(), want, 0.05)


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_all_images_to_one_of_any_number_of_experts(experts: int) -> None:
    tower = make("siglip", num_experts=experts)
    images = pixels(3, SIZE)
    for expert in {0, experts - 1}:
        assert_close(run(tower, images, expert), tile_by_tile(tower, images, [expert] * 3))
    assert run(tower, images, 0).shape == (3, 9, OUT)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit"])
def test_a_cpu_without_bfloat16_keeps_the_trunk_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pixels to the last shared block, rounded once: the features a float32 twin gives."""
    monkeypatch.setitem(native.NATIVE, torch.bfloat16, False)
    tower = make(kind).bfloat16()
    twin = copy.deepcopy(tower).float()
    images = pixels(3, KINDS[kind].size).bfloat16()
    with torch.no_grad():
        got, want = tower.trunk_features(images), twin.trunk_features(images.float())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
