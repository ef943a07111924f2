"""Mixpertized models on what transformers' own processors make of images.

An image is half black and half white, and is cut between the two: its crops are of one colour, its base tile of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from _mllms import KINDS, PATCH, PINPOINTS, SIZE
from PIL import Image
from test_mllm_parity import assert_close, mixed
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.smolvlm import processing_smolvlm

from mixpert_kernels.hf.mllm import record_routing

SQUARE = {"height": SIZE, "width": SIZE}
CROPS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
IDEFICS3 = ["<image>", "<fake_token_around_image>", "<global-img>", *CROPS]
CUT = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}}


def tokenizer(special: list[str], **named: str) -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", "look", "then"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", extra_special_tokens=named, **names
    )
    wrapped.add_special_tokens({"additional_special_tokens": special})
    return wrapped


def llava_next() -> Any:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaNextProcessor(images, tokenizer(["<image>"]), PATCH, **options)


def llava_onevision() -> Any:
    pytest.importorskip("torchvision")  # its processor of videos needs it
    images = transformers.LlavaOnevisionImageProcessorPil(
        size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    videos = transformers.LlavaOnevisionVideoProcessor(size=SQUARE)
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(["<image>", "<video>"]),
        videos,
        num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


def internvl() -> Any:
    pytest.importorskip("torchvision")
    images = transformers.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3
    )
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<image>", "video_token": "<video>"}
    videos = transformers.InternVLVideoProcessor()
    return transformers.InternVLProcessor(images, tokenizer([], **names), videos, 4)


def idefics3() -> Any:
    images = transformers.Idefics3ImageProcessorPil(**CUT)
    return transformers.Idefics3Processor(images, tokenizer(IDEFICS3), image_seq_len=4)


def smolvlm() -> Any:
    pytest.importorskip("torchvision")
    images = transformers.SmolVLMImageProcessorPil(**CUT)
    videos = transformers.SmolVLMVideoProcessor()
    return transformers.SmolVLMProcessor(images, tokenizer(IDEFICS3), videos, image_seq_len=4)


def qwen(family: str) -> Any:
    pytest.importorskip("torchvision")
    size = {"shortest_edge": 8 * PATCH**2, "longest_edge": 60 * PATCH**2}
    options = {"size": size, "patch_size": PATCH}
    images = transformers.Qwen2VLImageProcessorPil(**options)
    videos = transformers.Qwen2VLVideoProcessor(**options, do_sample_frames=False)
    names = {"image_token": "<image>", "video_token": "<video>"}
    whole = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family]
    return getattr(transformers, whole)(images, tokenizer([], **names), videos)


def halves(height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height))
    wide = width > height
    box = (width // 2, 0, width, height) if wide else (0, height // 2, width, height)
    picture.paste((255, 255, 255), box)
    return picture


def seen(model: nn.Module, inputs: dict[str, Tensor], call: Callable) -> tuple[Tensor, list]:
    """The tiles that the tower is called with, and the records."""
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    tiles = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tiles.append(args[0] if args else kwargs["pixel_values"])

    handle = tower.register_forward_pre_hook(keep, with_kwargs=True)
    with record_routing(model) as records:
        call(**inputs)
    handle.remove()
    return tiles[0], records


@pytest.mark.parametrize("make", [llava_next, llava_onevision, internvl, idefics3, smolvlm])
@torch.no_grad()
def test_the_tiles_that_a_processor_makes(make, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str, raising=False)
    kind, processor = KINDS[make.__name__], make()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    plain = kind.build(image_token_id=image_token)
    model = mixed(kind, model=kind.build(image_token_id=image_token))
    wide, tall = halves(SIZE, 2 * SIZE), halves(2 * SIZE, SIZE)
    for batch in ([[wide, tall], [wide]], [[tall], [wide]], [[wide], []]):
        inputs = processor(
            text=["look " + "<image> then " * len(images) for images in batch],
            images=batch if all(batch) or make is smolvlm else batch[0],
            padding=True,
            return_tensors="pt",
        )
        assert_close(model(**inputs).logits, plain(**inputs).logits)
        whole = (
            make is llava_onevision and len(batch[0]) > 1
        )  # images that share a prompt stay whole
        counts = [1 if whole and len(images) > 1 else 3 for images in batch for _ in images]
        for call in (model, lambda **kw: model.generate(**kw, max_new_tokens=2)):
            tiles, (record,) = seen(model, inputs, call)
            image = [i for i, count in enumerate(counts) for _ in range(count)]
            assert record.images.image_of_tile.tolist() == image
            base = record.images.base_tile[: len(counts)].tolist()
            spread = tiles.flatten(1).std(1)
            assert [bool(s > 0.5) for s in spread] == [i in base for i in range(len(tiles))]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_images_and_videos_of_any_size(family):
    """Each is one tile, of as many rows as the processor makes patches, and routed as it would be by itself."""
    kind, processor = KINDS[family], qwen(family)
    names = {"image_token_id": "<image>", "video_token_id": "<video>"}
    ids = {n: processor.tokenizer.convert_tokens_to_ids(token) for n, token in names.items()}
    plain, model = kind.build(**ids), mixed(kind, model=kind.build(**ids))
    images = [halves(24, 40), halves(64, 12), halves(16, 16)]
    videos = [torch.randint(0, 256, (frames, 3, 24, 16), dtype=torch.uint8) for frames in (6, 4)]

    def call(text: list[str], **seen: Any) -> list:
        inputs = processor(text=text, padding=True, return_tensors="pt", **seen)
        with record_routing(model) as records:
            assert_close(model(**inputs).logits, plain(**inputs).logits)
            got = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        wanted = plain.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(got, wanted)
        for record in records:
            grids = inputs[f"{record.modality}_grid_thw"]
            ends = grids.prod(-1).cumsum(0).tolist()
            assert record.routing.cu_seqlens.tolist() == [0, *ends]
        return records

    text = ["look <image> then <video> then <image>", "look", "<image> <video>"]
    image, video, *again = call(text, images=images, videos=videos)
    assert [record.modality for record in (image, video)] == ["image", "video"]
    assert [record.modality for record in again] == ["image", "video"]
    assert video.routing.cu_seqlens.tolist() == [0, 72, 120]  # 3 and 2 pairs of frames
    for together, token, name, each in (
        (image, "<image>", "images", images),
        (video, "<video>", "videos", videos),
    ):
        for i, one in enumerate(each):
            alone = call([token], **{name: [one]})[0]
            torch.testing.assert_close(alone.scores[0], together.scores[i])
