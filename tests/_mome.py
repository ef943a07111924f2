"""A tiny MoME model of every part, with all parameters random, and what it is called with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from mixpert_kernels.hf import mome
from mixpert_kernels.testing import randomize_

SIZE, SENTENCE, HOLDER = 4, 8, 99  # 4 x 4 visual tokens; the placeholder is in no vocabulary
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
PACKED = {
    "hidden_size": 16,
    "patch_embed_hidden_size": 12,
    "d_ff": 24,
    "d_kv": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "seq_len": 64,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": None,  # random models stop anywhere
}
OPTIONS = {"layers": 1, "heads": 2, "points": 2, "ffn": 8}
PROCESSORS = {
    "clip": transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
    "dino": transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24}),
    "pix": transformers.Pix2StructImageProcessorPil(
        patch_size={"height": 2, "width": 2}, max_patches=40
    ),
}
# Two that most routers of the model tell apart, and prompts of different lengths, padded at the left.
TEXTS = ["read the text", "where is the cat"]
IDS = torch.tensor([[0, 0, 1, HOLDER, 5, 6], [1, 7, HOLDER, 8, 9, 10]])
MASK = (IDS > 0).long()


def llm(seed: int = 0, **options: Any) -> nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | options)).eval()
    return randomize_(model, seed)


def encoders() -> dict[str, nn.Module]:
    """CLIP's grid is that of the visual tokens, DINOv2's larger, Pix2Struct's of any shape."""
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    larger = {**VISION, "image_size": 24, "mlp_ratio": 2}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**larger))
    pix = transformers.Pix2StructVisionModel(transformers.Pix2StructVisionConfig(**PACKED))
    made = {"clip": clip, "dino": dino, "pix": pix}
    return {name: randomize_(model.eval(), i) for i, (name, model) in enumerate(made.items())}


def sentences(texts: list[str]) -> Tensor:
    """A sentence encoder: what it gives for a text depends on nothing else."""
    rows = []
    for text in texts:
        seed = int.from_bytes(text.encode()[:6], "little")
        rows.append(torch.randn(SENTENCE, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def make(seed: int = 5, **options: Any) -> mome.MomeForConditionalGeneration:
    """A model whose parameters are all random."""
    given = {
        "sentence_encoder": sentences,
        "sentence_width": SENTENCE,
        "size": SIZE,
        "hidden": 4,
        "options": OPTIONS,
        "processors": PROCESSORS,
        "image_token_id": HOLDER,
    }
    chosen = given | {"llm": llm(), "encoders": encoders()} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mome.build(chosen.pop("llm"), chosen.pop("encoders"), **chosen)
    own = model.own_parameters()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in own.items():
            spread = 0.1 if name.endswith("reference_points") else max(p.shape[-1], 4) ** -0.5
            spread *= 2 if ".router." in name else 1  # so that instructions differ in their routes
            p.add_(spread * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def pictures() -> list[Image.Image]:
    """Two of which Pix2Struct makes grids of other shapes: 5 x 7 patches and 1 x 34."""
    rng = np.random.default_rng(0)
    shapes = ((20, 30), (2, 60))
    return [Image.fromarray(rng.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in shapes]


def call(model: mome.MomeForConditionalGeneration, rows: slice = slice(None)) -> dict[str, Any]:
    """What the model is called with, for some samples of the two."""
    images = model.processor(pictures())
    return {
        "input_ids": IDS[rows],
        "attention_mask": MASK[rows],
        "images": {n: {k: v[rows] for k, v in of.items()} for n, of in images.items()},
        "instructions": TEXTS[rows],
    }


def logits(model: mome.MomeForConditionalGeneration, rows: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        return model(**call(model, rows)).logits


def doubled(model: mome.MomeForConditionalGeneration) -> mome.MomeForConditionalGeneration:
    return copy.deepcopy(model).double()


def write_bert(directory: Path, seed: int = 0) -> Path:
    """A BERT of width SENTENCE and its tokenizer, which knows the words of TEXTS."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *dict.fromkeys(" ".join(TEXTS).split())]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=SENTENCE,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    randomize_(transformers.BertModel(config), seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
