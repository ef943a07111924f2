"""Models whose towers take the patches of all images and videos of a call as packed rows: Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from _gpu_with_values import move, put, waits
from _mllms import END, EXPERTS, IMAGE, KINDS, PATCH, START, VIDEO
from PIL import Image
from safetensors.torch import load_file
from test_mllm_parity import assert_close, mixed
from torch import Tensor, nn

from mixpert_kernels import backends, cli
from mixpert_kernels.hf.mllm import (
    expert_shares,
    forced_routing,
    record_routing,
    router_features,
    unmixpertize,
)
from mixpert_kernels.hf.mllm.blocks import ExpertLayer
from mixpert_kernels.hf.mllm.families import FAMILIES

families = pytest.mark.parametrize("family", [f for f in KINDS if FAMILIES[f].packed])
Grid = tuple[int, int, int]  # frames, rows and columns of patches, a frame being two of the video's
TOKENS = {"image": IMAGE, "video": VIDEO}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# Images of one token, of whole windows of Qwen2.5-VL's (4 x 4 patches), and of parts of them; one is longer than wide.
SHAPES: list[Grid] = [(1, 2, 2), (1, 8, 4), (1, 6, 10), (1, 4, 4), (1, 18, 2)]
CLIPS: list[Grid] = [(3, 4, 6), (2, 2, 4)]
GENERATE = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def call(*prompts: list[tuple[str, Grid]], seed: int = 0) -> dict[str, Tensor]:
    """What a model is called with for prompts of images and videos, padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    rows, grids = [], {modality: [] for modality in TOKENS}
    for i, prompt in enumerate(prompts):
        row = [1, 3 + i]
        for modality, grid in prompt:
            tokens = grid[0] * grid[1] * grid[2] // 4
            row += [START, *[TOKENS[modality]] * tokens, END, 5 + i]
            grids[modality].append(grid)
        rows.append([*row, 7, 8])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    types = sum((ids == token) * (i + 1) for i, token in enumerate(TOKENS.values()))
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "mm_token_type_ids": types}
    for modality, found in grids.items():
        if found:
            inputs |= pixels(modality, found, generator)
    return inputs


def pixels(modality: str, grids: list[Grid], generator: torch.Generator) -> dict[str, Tensor]:
    rows = sum(t * h * w for t, h, w in grids)
    values = torch.randn(rows, 3 * 2 * PATCH * PATCH, generator=generator)
    return {PIXELS[modality]: values, f"{modality}_grid_thw": torch.tensor(grids)}


def images(*grids: Grid, seed: int = 0) -> dict[str, Tensor]:
    return call([("image", grid) for grid in grids], seed=seed)


def features(model: nn.Module, inputs: dict[str, Tensor], modality: str = "image") -> list[Tensor]:
    """Of each image, or video: what its tokens become."""
    given = {name: inputs[name] for name in (PIXELS[modality], f"{modality}_grid_thw")}
    found = getattr(model.base_model, f"get_{modality}_features")(**given)
    return list(found.pooler_output)


def bounds(*grids: Grid) -> list[int]:
    return [0, *torch.tensor(grids).prod(-1).cumsum(0).tolist()]


@families
def test_a_video_is_one_tile_whose_frames_share_a_route(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    inputs = call([("video", CLIPS[0])], [("video", CLIPS[1])])
    with record_routing(model) as records:
        assert_close(model(**inputs).logits, plain(**inputs).logits)
        for options in (GENERATE, {**GENERATE, "num_beams": 2}):
            got = model.generate(**inputs, **options)
            assert torch.equal(got, plain.generate(**inputs, **options))
    assert len(records) == 3
    for record in records:
        assert record.modality == "video"
        assert record.routing.cu_seqlens.tolist() == bounds(*CLIPS)
        assert record.scores.shape == (2, EXPERTS)
        assert torch.equal(record.scores.argmax(1), record.expert)


@families
def test_every_frame_of_a_video_has_a_say(family):
    model = mixed(KINDS[family])
    inputs = call([("video", CLIPS[0]), ("video", CLIPS[1])])
    rows = CLIPS[0][1] * CLIPS[0][2]
    with record_routing(model) as records:
        model(**inputs)
        for frame in range(CLIPS[0][0]):
            changed = {name: value.clone() for name, value in inputs.items()}
            changed["pixel_values_videos"][frame * rows : (frame + 1) * rows] += 1
            model(**changed)
    wanted, *others = [record.scores for record in records]
    for scores in others:
        assert not torch.equal(scores[0], wanted[0])
        assert torch.equal(scores[1], wanted[1])


@families
def test_a_video_has_the_features_of_its_expert_alone(family):
    model = mixed(KINDS[family], distinct=True)
    inputs = call([("video", CLIPS[0]), ("video", CLIPS[1])])
    alone = [unmixpertize(copy.deepcopy(model), expert) for expert in range(EXPERTS)]
    wanted = [features(plain, inputs, "video") for plain in alone]
    with forced_routing(model, 0, video_expert=[2, 1]), record_routing(model) as records:
        got = features(model, inputs, "video")
    assert records[0].expert.tolist() == [2, 1]
    for i, expert in enumerate([2, 1]):
        assert_close(got[i], wanted[expert][i])
        assert float((got[i] - wanted[0][i]).abs().max()) > 1e-2


@families
def test_images_and_videos_of_a_call_are_routed_apart(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    mixture = [("image", SHAPES[1]), ("video", CLIPS[0]), ("image", SHAPES[2])]
    inputs = call(mixture, [("video", CLIPS[1])], [])
    assert_close(model(**inputs).logits, plain(**inputs).logits)
    routes = forced_routing(model, [1, 0], video_expert=[2, 1])
    with record_routing(model) as records, routes, expert_shares(model) as shares:
        model(**inputs)
        output = model.generate(**inputs, **GENERATE, return_dict_in_generate=True)
    found = [(record.modality, record.expert.tolist()) for record in records]
    assert found == [("image", [1, 0]), ("video", [2, 1])] * 2  # each once, under generate too
    assert [record.modality for record in output.router] == ["image", "video"]
    assert torch.equal(output.sequences, plain.generate(**inputs, **GENERATE))
    assert shares.counts().tolist() == [[2, 2, 0], [0, 2, 2]]
    with forced_routing(model, image_of_tile=[0, 0]), record_routing(model) as together:
        model(**inputs)
    assert [len(record.expert) for record in together] == [1, 2]  # of images alone


@families
def test_images_of_any_size(family):
    """One token, whole windows of the attention or not, alone or before and after others."""
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind, distinct=True)
    inputs = images(*SHAPES)
    routes = [2, 0, 1, 1, 2]
    alone = [unmixpertize(copy.deepcopy(model), expert) for expert in range(EXPERTS)]
    with forced_routing(model, routes), record_routing(model) as records:
        got = features(model, inputs)
    assert records[0].routing.cu_seqlens.tolist() == bounds(*SHAPES)
    for i, (grid, expert) in enumerate(zip(SHAPES, routes, strict=True)):
        one = {
            "pixel_values": inputs["pixel_values"].split(torch.tensor(SHAPES).prod(-1).tolist())[i],
            "image_grid_thw": torch.tensor([grid]),
        }
        assert_close(got[i], features(alone[expert], one)[0])
    untrained = mixed(kind)
    for expert in range(EXPERTS):
        with forced_routing(untrained, expert):
            assert_close(untrained(**inputs).logits, plain(**inputs).logits)


@families
def test_the_rows_of_an_image_stay_together(family):
    """Each block with experts, and the merger, gets the rows of one image after those of another.

    Qwen2.5-VL's attention in windows puts the rows of an image into another order, so that rows cannot be told by
    their places alone: here every image is of one value, without positions, and so is what the blocks make of it.
    """
    kind = KINDS[family]
    model, inputs = mixed(kind), images(*SHAPES)
    inputs["pixel_values"] = torch.cat(
        [
            torch.full((count, 96), 0.1 * (i + 1))
            for i, count in enumerate(torch.tensor(SHAPES).prod(-1).tolist())
        ]
    )
    seen, edges = [], bounds(*SHAPES)

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    merger = model.model.visual.merger
    for part in (*(m for m in model.modules() if isinstance(m, ExpertLayer)), merger):
        part.register_forward_pre_hook(keep, with_kwargs=True)
    model(**inputs)
    assert len(seen) == 3
    for x in seen:
        means = []
        for first, last in itertools.pairwise(edges):
            rows = x[first:last]
            assert float((rows - rows[:1]).abs().max()) < 1e-4
            means.append(rows[0])
        apart = torch.cdist(torch.stack(means), torch.stack(means)) + torch.eye(len(means))
        assert float(apart.min()) > 1e-2


@families
def test_an_image_is_bitwise_the_same_alone_and_in_any_batch(family, monkeypatch):
    """On the reference backend, tiny as the model is: for larger ones a plain Linear's rows depend on their number."""
    monkeypatch.setattr(backends, "in_order", lambda *_: ("reference",))
    kind = KINDS[family]
    model, inputs = mixed(kind, distinct=True), images(*SHAPES)
    counts = torch.tensor(SHAPES).prod(-1).tolist()
    parts = inputs["pixel_values"].split(counts)

    def run(order: list[int]) -> tuple[list[Tensor], Tensor]:
        given = {
            "pixel_values": torch.cat([parts[i] for i in order]),
            "image_grid_thw": torch.tensor([SHAPES[i] for i in order]),
        }
        with record_routing(model) as records:
            found = features(model, given)
        return found, records[0].scores

    whole, scores = run([0, 1, 2, 3, 4])
    for order in ([0], [1], [2], [3], [4], [3, 1], [4, 3, 2, 1, 0], [2, 2, 0]):
        found, given = run(order)
        assert torch.equal(given, scores[order])
        assert all(torch.equal(found[n], whole[i]) for n, i in enumerate(order))


@families
def test_the_tower_called_by_itself(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    inputs = images(*SHAPES[:3])
    rows, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    wanted = plain.model.visual(rows, grids).pooler_output
    with record_routing(model) as records:
        assert_close(model.model.visual(rows, grids).pooler_output, wanted)
        assert_close(model.model.visual(rows, grid_thw=grids).pooler_output, wanted)
        model(**inputs)
    assert len(records) == 3
    for record in records:
        assert record.modality == "image"
        assert record.routing.cu_seqlens.tolist() == bounds(*SHAPES[:3])
        assert torch.equal(record.scores, records[0].scores)
    with pytest.raises(ValueError, match=r"grid_thw must have as many .* rows, 96, got 36"):
        model.model.visual(rows, grids[:2])


@families
@pytest.mark.parametrize("base", [None, [1, 2]])
def test_the_caller_says_which_grids_are_of_one_image(family, base):
    model, inputs = mixed(KINDS[family]), images(*SHAPES[:3])
    with record_routing(model) as apart:
        model(**inputs)
    asked = {"image_of_tile": [0, 0, 1], "base_tile": base}
    with forced_routing(model, **asked), record_routing(model) as records:
        model(**inputs)
        model.generate(**inputs, **GENERATE)
        pooled = router_features(model, **inputs)
    for record in records[:2]:
        assert torch.equal(record.scores, apart[0].scores[base or [0, 2]])
        assert torch.equal(record.routing.expert.long(), record.expert[[0, 0, 1]])
    scores = model.base_model.mixpert_router(pooled).softmax(-1)
    torch.testing.assert_close(scores, records[0].scores)
    with forced_routing(model, [1, 2], **asked), record_routing(model) as forced:
        model(**inputs)
    assert forced[0].routing.expert.tolist() == [1, 1, 2]
    for wrong, match in (
        ({"image_of_tile": [0, 0]}, "image_of_tile must have one entry a tile, 3, got 2"),
        ({"expert": [0, 1]}, "expert must have one entry an image, 3, got 2"),
    ):
        with (
            pytest.raises(ValueError, match=f"^mixpertize: {match}"),
            forced_routing(model, **wrong),
        ):
            model(**inputs)


@families
def test_images_without_a_prompt_and_prompts_without_images(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    inputs = images(*SHAPES[:2])
    with record_routing(model) as records:
        for got, wanted in zip(features(model, inputs), features(plain, inputs), strict=True):
            assert_close(got, wanted)
        assert records[0].scores.shape == (2, EXPERTS)
        tokens = {n: inputs[n] for n in ("input_ids", "attention_mask", "mm_token_type_ids")}
        assert_close(model(**tokens).logits, plain(**tokens).logits)  # placeholders of no image
        text = call([], [])
        assert torch.equal(model.generate(**text, **GENERATE), plain.generate(**text, **GENERATE))
    assert len(records) == 1


@families
def test_what_does_not_fit_together(family):
    model = mixed(KINDS[family])
    inputs = call([("image", SHAPES[1]), ("image", SHAPES[2]), ("video", CLIPS[0])])
    grids, rows = inputs["image_grid_thw"], inputs["pixel_values"]
    integers = r"image_grid_thw must be \(B, 3\) integers, frames, rows and columns of patches, got"
    for change, match in (
        ({"image_grid_thw": grids[:1]}, "image_grid_thw must have as many patches .* 92, got 32"),
        ({"image_grid_thw": grids[[0, 1, 1]]}, "as pixel_values has rows, 92, got 152"),
        ({"pixel_values": rows[:-4]}, "as pixel_values has rows, 88, got 92"),
        ({"pixel_values_videos": rows}, "video_grid_thw must .* as pixel_values_videos .* got 72"),
        ({"image_grid_thw": None}, f"{integers} None"),
        ({"image_grid_thw": grids.float()}, rf"{integers} \(2, 3\), torch.float32"),
        ({"image_grid_thw": grids[0]}, rf"{integers} \(3,\)"),
        ({"video_grid_thw": None}, "video_grid_thw must be"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            model(**{**inputs, **change})
        assert str(error.value).startswith("mixpertize: ") and "\n" not in str(error.value)
    fewer = {**inputs, **pixels("image", [SHAPES[1]], torch.Generator())}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**fewer)


@families
def test_videos_add_no_waits(family):
    kind = KINDS[family]
    inputs = call([("image", SHAPES[1]), ("video", CLIPS[0])], [("video", CLIPS[1])])
    inputs = {name: put(value) for name, value in inputs.items()}
    routes = {"expert": torch.tensor([1]), "video_expert": torch.tensor([2, 1])}
    found = []
    for model, forced in ((kind.build(), None), (mixed(kind), {}), (mixed(kind), routes)):
        move(model)
        for run in (model, lambda m=model, **given: m.generate(**given, **GENERATE)):
            with waits() as seen:
                if forced is None:
                    run(**inputs)
                else:
                    with forced_routing(model, **forced), record_routing(model):
                        run(**inputs)
            found.append(seen)
    assert found[0] and found == found[:2] * 3


@families
def test_on_the_command_line(family, tmp_path, capsys):
    """``convert`` and ``route``, with the image processor of the published models."""
    kind, plain, mixture = KINDS[family], tmp_path / "plain", tmp_path / "mixed"
    kind.build().save_pretrained(plain)
    size = {"shortest_edge": 8 * 8, "longest_edge": 48 * 48}
    processor = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    processor.save_pretrained(plain)
    names = ["versatile", "photo", "chart"]
    options = ["--expert-names", ",".join(names), "--out", str(mixture)]
    assert cli.main(["convert", str(plain), *options]) == 0
    pictures = [Image.new("RGB", (24, 40), "red"), Image.new("RGB", (16, 8), "blue")]
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    capsys.readouterr()
    assert cli.main(["route", "--model", str(mixture), "--json", *paths]) == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(mixture)
    inputs = processor(images=pictures, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 6], [1, 2, 4]]
    with record_routing(model) as records:
        features(model, inputs)
    (record,) = records
    assert [row["name"] for row in rows] == [names[e] for e in record.expert.tolist()]
    scores = torch.tensor([list(row["scores"].values()) for row in rows])
    torch.testing.assert_close(scores, record.scores)


@families
def test_parameters_are_saved_under_the_published_names(family, tmp_path):
    """Which are not the model's own: the language model's 26 tensors are the first to get lost."""
    kind = KINDS[family]
    plain = kind.build()
    plain.save_pretrained(tmp_path / "plain")
    mixed(kind).save_pretrained(tmp_path / "mixed")
    names, more = (load_file(tmp_path / d / "model.safetensors") for d in ("plain", "mixed"))
    assert (
        sum(name.startswith(("model.layers.", "model.embed", "model.norm")) for name in names) == 26
    )
    assert {name.partition(".")[0] for name in names} == {"visual", "model", "lm_head"}
    new = more.keys() - names.keys()
    assert names.keys() < more.keys() and len(new) == 4
    assert all(name.startswith("model.mixpert_router.") for name in new)
