"""Writes what a recipe of MoME reads, far too small to be of use: random models and images with instructions.

Usage: python tiny_mome.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

TASKS = {"tint": "what tint ?", "shade": "which shade is it ?"}  # a task and its instruction
TINTS = {"red": 0, "blue": 2}  # a word and its channel
SHADES = {"dark": 40, "light": 200}
WORDS = sorted({word for text in TASKS.values() for word in text.split()}) + [*TINTS, *SHADES]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_models(root: Path) -> None:
    """``llm``, ``minilm`` and three encoders: ``clip`` sees 4 x 4 patches, ``dino`` 5 x 5, ``pix`` at most 12."""
    torch.manual_seed(0)
    small = {**SIZES, "intermediate_size": 32}
    vocabulary = {"vocab_size": 3 + len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    llm = {**small, **vocabulary, "num_hidden_layers": 2, "bos_token_id": None}
    square = {"height": 4, "width": 4}
    pix = {"patch_embed_hidden_size": 48, "d_ff": 32, "d_kv": 8, "initializer_range": 0.05}
    for name, model in {
        "llm": t.LlamaForCausalLM(t.LlamaConfig(**llm)),
        "minilm": t.BertModel(t.BertConfig(**small, vocab_size=3 + len(WORDS))),
        "clip": t.CLIPVisionModel(t.CLIPVisionConfig(**small, image_size=16, patch_size=4)),
        "dino": t.Dinov2Model(t.Dinov2Config(**SIZES, mlp_ratio=2, image_size=20, patch_size=4)),
        "pix": t.Pix2StructVisionModel(t.Pix2StructVisionConfig(**SIZES, **pix, seq_len=32)),
    }.items():
        model.save_pretrained(root / name)
    for name in ("llm", "minilm"):
        tokenizer().save_pretrained(root / name)
    for name, side in {"clip": 16, "dino": 20}.items():
        sides = {"height": side, "width": side}
        t.ViTImageProcessor(size=sides).save_pretrained(root / name)
    t.Pix2StructImageProcessor(patch_size=square, max_patches=12).save_pretrained(root / "pix")


def tokenizer() -> t.PreTrainedTokenizerFast:
    """A token a word."""
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def write_data(root: Path, each: int = 2) -> None:
    """``train.jsonl`` and ``test.jsonl``: both tasks on each image, which are of several sizes."""
    (root / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = []
        for shade, level in SHADES.items():
            for tint, channel in TINTS.items():
                for i in range(each):
                    pixels = random.integers(0, 30, (16, 12 + 4 * i, 3)) + level
                    pixels[..., channel] += 25
                    image = f"images/{split}-{shade}-{tint}-{i}.png"
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / image)
                    for task, text in (("tint", tint), ("shade", shade)):
                        row = {"image": image, "domain": task, "instruction": TASKS[task]}
                        rows.append({**row, "text": text})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_data(root)
    write_models(root)
    print(f"wrote {root}: models, images, train.jsonl and test.jsonl")
