"""Tiny models on disk, images with instructions, and recipes of MoME on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from _recipes import LABELS, picture, tiny_language

TASKS = {"tint": "what tint ?", "shade": "which shade is it ?"}
WORDS = sorted({word for text in TASKS.values() for word in text.split()})
SHADES = {"photo": "dark", "chart": "light"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def words_tokenizer(directory: Path, words: list[str]) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *words]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(directory)


def models(root: Path) -> Path:
    """``llm``, ``minilm``, ``clip`` (4 x 4 patches), ``dino`` (5 x 5) and ``pix`` (as each image has them)."""
    import transformers as t

    tiny_language(root / "llm", num_key_value_heads=1, vocab_size=24)
    words_tokenizer(root / "llm", [*WORDS, *LABELS, *SHADES.values()])
    torch.manual_seed(0)
    small = {**SIZES, "intermediate_size": 32}
    sentence = {**small, "hidden_size": 12, "vocab_size": 3 + len(WORDS)}
    t.BertModel(t.BertConfig(**sentence, max_position_embeddings=16)).save_pretrained(
        root / "minilm"
    )
    words_tokenizer(root / "minilm", WORDS)
    sizes = {"size": {"height": 16, "width": 16}}
    clip = t.CLIPVisionConfig(**small, image_size=16, patch_size=4)
    t.CLIPVisionModel(clip).save_pretrained(root / "clip")
    t.ViTImageProcessor(**sizes).save_pretrained(root / "clip")
    dino = t.Dinov2Config(**SIZES, mlp_ratio=2, image_size=20, patch_size=4)
    t.Dinov2Model(dino).save_pretrained(root / "dino")
    t.ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(root / "dino")
    pix = t.Pix2StructVisionConfig(
        **SIZES, d_ff=32, d_kv=8, patch_embed_hidden_size=48, seq_len=32, initializer_range=0.05
    )
    t.Pix2StructVisionModel(pix).save_pretrained(root / "pix")
    t.Pix2StructImageProcessor(
        patch_size={"height": 4, "width": 4}, max_patches=12
    ).save_pretrained(root / "pix")
    return root


def tasks(root: Path, each: int = 2) -> Path:
    """``train.jsonl`` and ``test.jsonl``: two tasks on the same images."""
    (root / "images").mkdir(parents=True)
    for name in ("train", "test"):
        rows = []
        for domain, shade in SHADES.items():
            for label in LABELS:
                for i in range(each):
                    image = f"images/{name}-{domain}-{label}-{i}.png"
                    picture(domain, label, seed=i, size=12 + 4 * i).save(root / image)
                    for task, answer in (("tint", label), ("shade", shade)):
                        row = {"image": image, "domain": task, "text": answer}
                        rows.append({**row, "instruction": TASKS[task]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    return root


def mome_table(root: Path, output: str = "out", **changes: object) -> dict:
    """A recipe as TOML would hold it, of the models and tasks below ``root``."""
    given = {"steps": 4, "batch": 4, "lr": 1e-2, "warmup": 1}
    made = {
        "output": str(root / output),
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 3,
        "data": {"train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")},
        "model": {
            "language": str(root / "llm"),
            "mome": {
                "sentence": str(root / "minilm"),
                "experts": 3,
                "hidden": 4,
                "size": 4,
                "encoders": {name: str(root / name) for name in ("clip", "dino", "pix")},
                "options": {"layers": 1, "heads": 2, "points": 2, "ffn": 16},
            },
        },
        "stage": [{"name": "move", **given}, {"name": "clone"}, {"name": "mole", **given}],
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            value = {**made[key], **value}
        made[key] = value
    return made
