"""Tiny vision-language models of every family, with what each is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mixpert_kernels.testing import randomize_

SIZE, PATCH, LAYERS, EXPERTS = 16, 4, 4, 3  # 4 x 4 patches a tile
IMAGE, VIDEO, START, END, GLOBAL, ROW = (
    60,
    61,
    58,
    59,
    57,
    50,
)  # token ids; ROW, ROW + 1, ... name crops
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
LLAMA = {"model_type": "llama", **TEXT}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]

Prompts = Sequence[Sequence[int]]  # of each prompt, how many tiles each of its images has
Inputs = tuple[list[list[list[int]]], dict[str, Tensor]]  # each image's tokens; the other inputs


@dataclass(frozen=True)
class Kind:
    """One family.

    Attributes:
        model: name of the class in transformers.
        config: fields of its configuration.
        inputs: from prompts and the pixels of their tiles to what the model's processor makes of them.
        few: how many tiles an image may have, and
        many: how many a larger one.
        shared: the two numbers for images that share a prompt, where others.
        base: whether an image's ``first`` or ``last`` tile is the whole of it.
        types: the name of the argument by which the model is told which tokens are of images, if it is.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Prompts, Tensor], Inputs]
    few: int = 1
    many: int = 1
    shared: tuple[int, int] | None = None
    base: str = "first"
    types: str | None = None

    @property
    def prompts(self) -> dict[str, Prompts]:
        """Prompts of every kind: one image, several, none, and batches of prompts with different numbers of them."""
        few, many = self.shared or (self.few, self.many)
        return {
            "one image": [[self.many]],
            "several images": [[few, many, few]],
            "text only": [[]],
            "batch": [[self.many], [many, few], [], [self.few]],
        }

    def build(self, seed: int = 0, **overrides: Any) -> nn.Module:
        """The model in eval mode, every parameter random."""
        cls = getattr(transformers, self.model)
        config = cls.config_class(**{**self.config, **overrides})
        model = randomize_(cls(config).eval(), seed)
        model.generation_config.eos_token_id = None  # random models stop anywhere
        return model

    def call(self, prompts: Prompts, seed: int = 0) -> dict[str, Tensor]:
        """What the model is called with: prompts, padded at the left."""
        generator = torch.Generator().manual_seed(seed)
        total = sum(n for prompt in prompts for n in prompt)
        pixels = torch.randn(total, 3, SIZE, SIZE, generator=generator)
        spans, inputs = self.inputs(prompts, pixels) if total else ([[] for _ in prompts], {})
        rows = []
        for i, images in enumerate(spans):
            row = [1, 3 + i]
            for span in images:
                row += [*span, 5 + i]
            rows.append([*row, 7, 8, 9 + i])
        width = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            gap = [0] * (width - len(row))
            ids.append(gap + row)
            mask.append(gap + [1] * len(row))
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        inputs |= {"input_ids": ids, "attention_mask": mask}
        if self.types:
            inputs[self.types] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        return inputs


def _tokens(prompts: Prompts, count: Callable[[int], int]) -> list[list[list[int]]]:
    return [[[IMAGE] * count(n) for n in prompt] for prompt in prompts]


def _plain(tokens: int) -> Callable[[Prompts, Tensor], Inputs]:
    def inputs(prompts: Prompts, pixels: Tensor) -> Inputs:
        return _tokens(prompts, lambda n: tokens * n), {"pixel_values": pixels}

    return inputs


# An image of so many tiles, by its size: the base tile alone, with two beside each other, with four in a square.
SIZES = {1: (16, 16), 3: (16, 32), 5: (32, 32)}
TOKENS = {1: 16 + 1, 3: 16 + 4 * (8 + 1), 5: 16 + 8 * (8 + 1)}  # a newline after each row of a grid


def _next(prompts: Prompts, pixels: Tensor) -> Inputs:
    counts = [n for prompt in prompts for n in prompt]
    images = nn.utils.rnn.pad_sequence(pixels.split(counts), batch_first=True)
    sizes = torch.tensor([SIZES[n] for n in counts])
    spans = _tokens(prompts, lambda n: TOKENS[n])
    return spans, {"pixel_values": images, "image_sizes": sizes}


def _onevision(prompts: Prompts, pixels: Tensor) -> Inputs:
    spans, inputs = _next(prompts, pixels)
    inputs["batch_num_images"] = torch.tensor([len(prompt) for prompt in prompts])
    return spans, inputs


def _internvl(prompts: Prompts, pixels: Tensor) -> Inputs:
    spans = [[[START, *[IMAGE] * (4 * n), END] for n in prompt] for prompt in prompts]
    return spans, {"pixel_values": pixels}


def _idefics3(prompts: Prompts, pixels: Tensor) -> Inputs:
    """A prompt's tiles are a row of pixel_values, filled up with black ones."""

    def span(n: int) -> list[int]:
        crops = [[END, ROW + i, *[IMAGE] * 4] for i in range(n - 1)]
        return [token for crop in crops for token in crop] + [END, GLOBAL, *[IMAGE] * 4, END]

    counts = [sum(prompt) for prompt in prompts]
    rows = pixels.new_zeros(len(prompts), max(counts), *pixels.shape[1:])
    for row, tiles in zip(rows, pixels.split(counts), strict=True):
        row[: len(tiles)] = tiles
    return [[span(n) for n in prompt] for prompt in prompts], {"pixel_values": rows}


# Grids of patches (frames, rows, columns) of images of any size; no two neighbours are of one size.
GRIDS = ((1, 4, 6), (1, 2, 4), (1, 10, 6), (1, 4, 4))


def patches(grids: Tensor, pixels: Tensor) -> Tensor:
    """Packed rows of as many patches as the grids have, made of each one's pixels again and again."""
    numbers = 3 * 2 * PATCH * PATCH  # two frames a patch
    rows = grids.prod(-1).tolist()
    flat = [p.flatten().repeat(n)[: n * numbers] for n, p in zip(rows, pixels, strict=True)]
    return torch.cat(flat).view(-1, numbers)


def _qwen(prompts: Prompts, pixels: Tensor) -> Inputs:
    grids = torch.tensor([GRIDS[i % len(GRIDS)] for i in range(len(pixels))])
    left = iter((grids.prod(-1) // 4).tolist())
    spans = [[[START, *[IMAGE] * next(left), END] for _ in prompt] for prompt in prompts]
    return spans, {"pixel_values": patches(grids, pixels), "image_grid_thw": grids}


_COMMON = {"image_token_id": IMAGE, "tie_word_embeddings": False}
_LLAVA = {**_COMMON, "vision_config": CLIP, "text_config": LLAMA}
_PAIR = {**VISION, "image_size": [SIZE] * 2, "patch_size": [PATCH] * 2}
_IDEFICS3 = {**_COMMON, "scale_factor": 2, "text_config": LLAMA, "pad_token_id": 0}
_PACKED = {"depth": LAYERS, "num_heads": 2, "patch_size": PATCH}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN = {
    **_COMMON,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "text_config": {**TEXT, "rope_parameters": _ROPE},
}

KINDS: dict[str, Kind] = {
    "llava": Kind(
        "LlavaForConditionalGeneration", {**_LLAVA, "vision_feature_layer": -2}, _plain(16)
    ),
    "vipllava": Kind(
        "VipLlavaForConditionalGeneration",
        {**_LLAVA, "vision_feature_layer": [-2, -3, 1]},
        _plain(16),
    ),
    "llava_next": Kind(
        "LlavaNextForConditionalGeneration",
        {**_LLAVA, "image_grid_pinpoints": PINPOINTS},
        _next,
        few=3,
        many=5,
    ),
    "llava_onevision": Kind(
        "LlavaOnevisionForConditionalGeneration",
        {
            **_COMMON,
            "vision_config": SIGLIP,
            "text_config": {"model_type": "qwen2", **TEXT},
            "video_token_id": VIDEO,
            "image_grid_pinpoints": PINPOINTS,
        },
        _onevision,
        few=3,
        many=5,
        shared=(1, 1),
    ),
    "paligemma": Kind(
        "PaliGemmaForConditionalGeneration",
        {
            **_COMMON,
            "vision_config": {**SIGLIP, "projection_dim": 16},
            "text_config": {"model_type": "gemma", **TEXT},
            "projection_dim": 16,
        },
        _plain(16),
        types="token_type_ids",
    ),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration",
        {
            **_COMMON,
            "vision_config": SIGLIP,
            "text_config": {"model_type": "gemma3_text", "sliding_window": 64, **TEXT},
            "mm_tokens_per_image": 4,
        },
        _plain(4),
        types="token_type_ids",
    ),
    "internvl": Kind(
        "InternVLForConditionalGeneration",
        {
            **_COMMON,
            "vision_config": {"model_type": "internvl_vision", **_PAIR},
            "text_config": {"model_type": "qwen2", **TEXT},
            "downsample_ratio": 0.5,
        },
        _internvl,
        many=3,
        base="last",
    ),
    "idefics3": Kind(
        "Idefics3ForConditionalGeneration",
        {**_IDEFICS3, "vision_config": {"model_type": "idefics3_vision", **VISION}},
        _idefics3,
        many=3,
        base="last",
    ),
    "smolvlm": Kind(
        "SmolVLMForConditionalGeneration",
        {**_IDEFICS3, "vision_config": {"model_type": "smolvlm_vision", **VISION}},
        _idefics3,
        many=3,
        base="last",
    ),
    "qwen2_vl": Kind(
        "Qwen2VLForConditionalGeneration",
        {
            **_QWEN,
            "vision_config": {**_PACKED, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2},
        },
        _qwen,
        types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Kind(
        "Qwen2_5_VLForConditionalGeneration",
        {
            **_QWEN,
            "vision_config": {
                **_PACKED,
                "hidden_size": 16,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "window_size": 4 * PATCH,  # no grid of the above is whole windows
                "fullatt_block_indexes": [1, 3],
            },
        },
        _qwen,
        types="mm_token_type_ids",
    ),
}
