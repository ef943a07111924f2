"""Tiny data sets and recipes for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mixpert_kernels.training import Recipe

EXPERTS = ["versatile", "photo", "chart"]
SHADES = {"photo": 40, "chart": 200, "document": 120}
LABELS = {"red": 0, "blue": 2}
SIGLIP = {"hidden": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 8}


def picture(domain: str, label: str, seed: int, size: int = 16) -> Image.Image:
    """An image whose shade is its domain and whose tint is its label."""
    noise = np.random.default_rng(seed).integers(0, 30, (size, size, 3))
    pixels = noise + SHADES[domain]
    pixels[..., LABELS[label]] += 25
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def labelled_folder(
    root: Path, each: int = 3, domains: tuple[str, ...] = ("photo", "chart")
) -> Path:
    """``DOMAIN/LABEL/i.png``."""
    for domain in domains:
        for label in LABELS:
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(each):
                picture(domain, label, seed=i).save(folder / f"{i}.png")
    return root


def captioned_folder(root: Path, each: int = 2) -> Path:
    """``DOMAIN/i.png`` with ``i.txt`` beside it."""
    for domain in EXPERTS[1:]:
        (root / domain).mkdir(parents=True)
        for i, label in enumerate(label for label in LABELS for _ in range(each)):
            picture(domain, label, seed=i).save(root / domain / f"{i}.png")
            (root / domain / f"{i}.txt").write_text(f"what tint ?\n{label}\n")
    return root


def tiny_language(directory: Path, **fields: object) -> Path:
    """A Llama of 24 channels with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "what", "tint", "?", *LABELS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "vocab_size": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **layers, **fields)).save_pretrained(directory)
    return directory


def stages(lr: float = 1e-2, steps: int = 3, **changes: object) -> list[dict]:
    """All six stages, ``steps`` each."""
    given = {"steps": steps, "batch": 4, "lr": lr, **changes}
    return [
        {"name": "alignment", **given},
        {"name": "knowledge", **given},
        {"name": "joint", **given},
        {"name": "clone"},
        {"name": "experts", **given},
        {"name": "router", "steps": 20, "lr": 1e-2},
    ]


def table(root: Path, output: str = "out", **changes: object) -> dict:
    """A recipe as TOML would hold it, on the folders ``train``, ``test`` and ``held_out`` below ``root``."""
    made = {
        "output": str(root / output),
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
        "data": {
            "train": str(root / "train"),
            "test": str(root / "test"),
            "held_out": str(root / "held_out"),
            "experts": EXPERTS,
        },
        "model": {"siglip": SIGLIP, "projector": 8, "expert_layers": 1, "head": "classifier"},
        "stage": stages(),
        "calibrate": {"max_errors": 0.05},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            value = {**made[key], **value}
        made[key] = value
    return made


def recipe(root: Path, output: str = "out", **changes: object) -> Recipe:
    return Recipe.from_dict(table(root, output, **changes))


def data(root: Path, each: int = 3) -> Path:
    """The three folders of ``table``."""
    for name in ("train", "test", "held_out"):
        labelled_folder(root / name, each)
    return root


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run: the model's in its last checkpoint."""
    return torch.load(output / "checkpoint.pt", weights_only=True)["model"]


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
