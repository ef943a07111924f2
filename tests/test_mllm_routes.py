"""Which tiles a mixpertized model takes for one image, routes from outside, and what it refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from _mllms import EXPERTS, KINDS, LLAMA, VIDEO
from test_mllm_parity import assert_close, by_image, mixed, projected

from mixpert_kernels.hf.mllm import forced_routing, mixpertize, record_routing, unmixpertize
from mixpert_kernels.hf.mllm.boundaries import from_counts, from_last_runs, from_runs

families = pytest.mark.parametrize("family", KINDS)
TILED = [family for family, kind in KINDS.items() if kind.many > 1]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@families
@pytest.mark.parametrize("generates", [False, True])
def test_the_tiles_of_an_image_share_its_base_tiles_route(family, generates):
    kind = KINDS[family]
    model = mixed(kind)
    for prompts in kind.prompts.values():
        counts = [n for prompt in prompts for n in prompt]
        if not counts:
            continue
        with record_routing(model) as records:
            if generates:
                model.generate(**kind.call(prompts), max_new_tokens=2)
            else:
                model(**kind.call(prompts))
        (record,) = records
        image = torch.tensor(by_image(prompts))
        if record.images.image_of_tile is None:
            assert kind.many == 1
        else:
            assert torch.equal(record.images.image_of_tile, image)
            wanted = from_counts(counts, kind.base).base_tile
            assert torch.equal(record.images.base_tile[: len(counts)], wanted)
        assert torch.equal(record.routing.expert.long(), record.expert[image])
        assert record.scores.shape == (len(counts), EXPERTS)
        assert torch.equal(record.scores.argmax(1), record.expert)


@pytest.mark.parametrize("family", TILED)
def test_only_the_base_tile_decides(family):
    kind = KINDS[family]
    model, inputs = mixed(kind), kind.call([[kind.many]])
    base = 0 if kind.base == "first" else kind.many - 1
    tiles = inputs["pixel_values"].view(-1, *inputs["pixel_values"].shape[-3:])
    with record_routing(model) as records:
        model(**inputs)
        for tile in range(kind.many):
            kept = tiles[tile].clone()
            tiles[tile] += 1
            model(**inputs)
            tiles[tile] = kept
    wanted, *changed = [record.scores for record in records]
    same = [torch.equal(scores, wanted) for scores in changed]
    assert same == [tile != base for tile in range(kind.many)]


def test_runs_of_image_tokens_are_images():
    ids = torch.tensor([[0, 9, 9, 9, 9, 1, 9, 9], [9, 9, 2, 0, 0, 0, 0, 0]])
    images = from_runs(ids, token=9, tiles=4, tokens_per_tile=2)
    assert images.image_of_tile.tolist() == [0, 0, 1, 2]
    assert images.base_tile.tolist() == [1, 2, 3, 3]  # and a dead one


def test_an_image_ends_with_a_run_announced_as_the_last_of_all():
    ids = torch.tensor(
        [[5, 9, 9, 6, 9, 9, 7, 9, 9], [7, 9, 9, 1, 5, 9, 9, 7, 0], [7, 9, 9, 0, 0, 0, 0, 0, 0]]
    )
    ids[1, 8] = 9
    ids = torch.cat([ids, torch.tensor([[0], [9], [0]])], 1)
    images = from_last_runs(ids, token=9, tiles=7, tokens_per_tile=2)
    assert images.image_of_tile.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert images.base_tile.tolist() == [2, 3, 5, 6, 6, 6, 6]


def test_the_frames_of_a_video_share_a_route():
    kind = KINDS["llava_onevision"]
    plain, model = kind.build(), mixed(kind)
    videos = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 3, *[VIDEO] * (3 * 4 + 1), 7], [1, 4, *[VIDEO] * (3 * 4 + 1), 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": videos}
    with record_routing(model) as records:
        assert_close(model(**inputs).logits, plain(**inputs).logits)
        wanted = plain.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)
    with forced_routing(model, 0, video_expert=[2, 1]), record_routing(model) as forced:
        model(**inputs)
    assert [r.modality for r in records] == ["video", "video"]
    assert records[0].images.image_of_tile.tolist() == [0, 0, 0, 1, 1, 1]
    assert records[0].images.base_tile.tolist() == [0, 3]
    assert forced[0].routing.expert.tolist() == [2, 2, 2, 1, 1, 1]


def test_images_and_videos_of_a_call_are_routed_apart():
    kind = KINDS["llava_onevision"]
    model, inputs = mixed(kind), kind.call([[3]])
    video = torch.tensor([[*[VIDEO] * (2 * 4 + 1), 7]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], video], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values_videos"] = torch.randn(1, 2, 3, 16, 16)
    with record_routing(model) as records, forced_routing(model, 1, video_expert=2):
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
    found = [(r.modality, r.routing.expert.tolist()) for r in records]
    assert found == [("image", [1, 1, 1]), ("video", [2, 2])] * 2


def test_the_caller_says_which_crops_are_of_one_image():
    kind = KINDS["gemma3"]
    model, inputs = mixed(kind, distinct=True), kind.call([[1, 1, 1], [1, 1]])
    with forced_routing(model, image_of_tile=[0, 0, 0, 1, 1]), record_routing(model) as records:
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
    images = {"image_of_tile": [0, 0, 0, 1, 1], "base_tile": [2, 3]}
    with forced_routing(model, **images), record_routing(model) as others:
        model(**inputs)
    with record_routing(model) as apart:
        model(**inputs)
    assert records[0].images.base_tile.tolist() == [0, 3]
    for found, base in ((records, [0, 3]), (others, [2, 3])):
        for record in found:
            assert torch.equal(record.expert, apart[0].expert[base])
            assert_close(record.scores.log(), apart[0].scores[base].log())


def test_the_callers_images_end_with_the_base_tile_where_the_familys_do():
    kind = KINDS["internvl"]
    model, inputs = mixed(kind), kind.call([[3, 1]])
    with forced_routing(model, image_of_tile=[0, 0, 1, 1]), record_routing(model) as records:
        model(**inputs)
    assert records[0].images.base_tile.tolist() == [1, 3]


def test_a_fused_block_with_layer_scales():
    kind = KINDS["llava"]
    vision = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 3, "mlp_ratio": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model = mixed(kind, distinct=True, model=kind.build(vision_config=vision))
    inputs = kind.call([[1, 1]])
    with forced_routing(model, [2, 1]):
        got = projected(model, inputs)
    for tile, expert in enumerate([2, 1]):
        alone = unmixpertize(copy.deepcopy(model), expert)
        assert_close(got[tile], projected(alone, inputs)[tile])


def test_the_router_is_of_the_towers_dtype():
    model = mixpertize(KINDS["llava"].build().to(torch.bfloat16), router_hidden=8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_names_of_experts():
    kind = KINDS["llava"]
    names = ["versatile", "chart", "document"]
    model = mixed(kind, distinct=True, expert_names=names)
    inputs = kind.call([[1, 1]])
    with forced_routing(model, "document"), record_routing(model) as records:
        wanted = torch.cat(projected(model, inputs))
    assert records[0].expert.tolist() == [2, 2]
    with forced_routing(model, ["chart", "versatile"]), record_routing(model) as others:
        model(**inputs)
    assert others[0].expert.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"expert must be one of \['versatile', .*got photo"):
        forced_routing(model, ["photo", "chart"]).__enter__()
    assert_close(torch.cat(projected(unmixpertize(model, "document"), inputs)), wanted)


def test_threads_and_models_have_routes_of_their_own():
    kind = KINDS["llava"]
    model, other, inputs = mixed(kind), mixed(kind), kind.call([[1, 1]])
    found = []
    with forced_routing(model, 2), record_routing(model) as records:
        with record_routing(other) as others:
            other(**inputs)

        def elsewhere() -> None:
            with torch.no_grad(), forced_routing(model, 1), record_routing(model) as there:
                model(**inputs)
                found.extend(there)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        model(**inputs)
    assert [r.expert.tolist() for r in (*records, *found)] == [[2, 2], [1, 1]]
    with record_routing(other) as free:
        other(**inputs)
    assert torch.equal(others[0].expert, free[0].expert)
    assert len(others) == 1 and torch.equal(others[0].expert, others[0].scores.argmax(1))


def test_a_tower_called_alone_routes_each_tile():
    kind = KINDS["internvl"]
    model = mixed(kind)
    pixels = kind.call([[3]])["pixel_values"]
    with record_routing(model) as records:
        model.model.vision_tower(pixels)
    assert records[0].expert.shape == (3,)


def test_boundaries_that_nothing_tells_are_an_error():
    for family in ("internvl", "idefics3", "smolvlm"):
        kind = KINDS[family]
        model, inputs = mixed(kind), kind.call([[3]])
        with pytest.raises(ValueError, match="must be called with input_ids"):
            model.get_image_features(inputs["pixel_values"])
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="must be called with input_ids"):
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])


def test_an_unknown_model_is_told_which_lines_to_add():
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(
        ValueError, match=r'FAMILIES in mixpert_kernels/hf/mllm/families.py: "llama": Mllm'
    ):
        mixpertize(model)


def test_a_tower_that_packs_images_is_refused():
    kind = KINDS["llava"]
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision |= {"intermediate_size": 24, "head_dim": 8, "image_size": 16, "patch_size": 4}
    with pytest.raises(ValueError, match=r"vision_config must be of type .*, got pixtral"):
        mixpertize(kind.build(vision_config=vision, vision_feature_layer=-1))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (
            {"expert_layers": 4},
            r"expert_layers must lie in 1..3 \(3 layers feed the feature\), got 4",
        ),
        ({"expert_layers": 0}, "expert_layers must lie in 1..3"),
        ({"routing": "best"}, "routing must be one of"),
        ({"delta": 2.0}, "delta must lie in"),
        ({"delta": None}, "delta must be a number, got None"),
        ({"tau": "a"}, "tau must be a number, got a"),
        ({"router_hidden": 0}, "router_hidden must be None or at least 1"),
        ({"expert_names": ["a", "a"]}, "expert_names must be 4 different names"),
        ({"expert_names": "abcd"}, "expert_names must be 4 different names, got abcd"),
        ({"expert_names": 4}, "expert_names must be 4 different names, got 4"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, match):
    model = KINDS["llava"].build()
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=match):
        mixpertize(model, **options)
    assert dict(model.state_dict()).keys() == before.keys()
    assert not hasattr(model.config, "mixpert")


def test_a_leaf_that_cannot_be_cloned_leaves_the_model_as_it_was():
    model = KINDS["llava"].build()
    model.model.multi_modal_projector.linear_2 = torch.nn.Bilinear(2, 2, 2)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot clone Bilinear at linear_2"):
        mixpertize(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_what_is_or_is_not_mixpertized():
    model = KINDS["llava"].build()
    for call in (
        unmixpertize,
        lambda m: forced_routing(m).__enter__(),
        lambda m: record_routing(m).__enter__(),
    ):
        with pytest.raises(
            ValueError, match="model must be a mixpertized model, got a plain Llava"
        ):
            call(model)
    with pytest.raises(ValueError, match="got a mixpertized model"):
        mixpertize(mixpertize(model))
    with pytest.raises(ValueError, match=r"expert must lie in 0..3, got 4"):
        unmixpertize(model, 4)
    with pytest.raises(ValueError, match="got Linear"):
        mixpertize(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next"])
def test_forced_routes_must_fit(family):
    kind = KINDS[family]
    (counts,) = kind.prompts["several images"]
    model, inputs, tiles = mixed(kind), kind.call([counts]), sum(counts)
    for routes in ([0, 1], []):
        match = f"expert must have one entry an image, 3, got {len(routes)}"
        with pytest.raises(ValueError, match=match), forced_routing(model, routes):
            model(**inputs)
    for images, match in (
        ([0, 0], "image_of_tile must have one entry a tile"),
        ([-1] * tiles, "image_of_tile must ascend from 0"),
        ([0] * (tiles - 1) + [2], "image_of_tile must have no gaps"),
    ):
        with (
            pytest.raises(ValueError, match=f"^mixpertize: {match}"),
            forced_routing(model, image_of_tile=images),
        ):
            model(**inputs)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"expert": 3}, "expert must lie in 0..2, got 3"),
        ({"expert": [0, 1, 3]}, "expert must lie in 0..2, got 3"),
        ({"expert": torch.tensor(3)}, "expert must lie in 0..2, got 3"),
        ({"expert": torch.tensor([0, -1])}, "expert must lie in 0..2, got -1"),
        ({"expert": torch.tensor([[0, 1]])}, r"expert must have 1 dimension, got shape \(1, 2\)"),
        ({"expert": torch.ones(2)}, "expert must have dtype int32 or int64, got torch.float32"),
        ({"expert": 1.0}, "expert must be numbers or names, got float 1.0"),
        ({"expert": True}, "expert must be numbers or names, got bool True"),
        ({"expert": [0, None]}, "expert must be numbers or names, got NoneType None"),
        ({"video_expert": torch.tensor([3])}, "video_expert must lie in 0..2, got 3"),
        ({"base_tile": [0]}, "base_tile must come with image_of_tile, got it alone"),
    ],
)
def test_forced_routes_are_refused_before_the_model_runs(given, match):
    model = mixed(KINDS["llava"])
    with pytest.raises(ValueError, match=f"^forced_routing: {match}"):
        forced_routing(model, **given).__enter__()


@pytest.mark.parametrize(
    "given", [np.int64(2), np.array([2, 2]), torch.tensor(2, dtype=torch.int32)]
)
def test_routes_from_numpy_and_tensors(given):
    kind = KINDS["llava"]
    model = mixed(kind)
    with forced_routing(model, given), record_routing(model) as records:
        model(**kind.call([[1, 1]]))
    assert records[0].expert.tolist() == [2, 2]


def test_a_projector_called_by_itself_is_an_error():
    model = mixed(KINDS["llava"])
    with pytest.raises(RuntimeError, match="must be called by get_image_features"):
        model.model.multi_modal_projector(torch.randn(1, 16, 16))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_sizes_that_tell_of_other_tiles_are_refused(family):
    kind = KINDS[family]
    model, inputs = mixed(kind), kind.call([[1]])
    inputs["image_sizes"] = torch.tensor([[16, 32]])
    with pytest.raises(ValueError, match=r"^mixpertize: .* as many tiles as there are, 1, got 3$"):
        model(**inputs)
