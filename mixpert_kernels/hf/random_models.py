"""Small transformers models with random weights, drawn from torch's default generator."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
)


def random_clip(*, hidden: int, layers: int, heads: int, image_size: int, patch_size: int) -> Any:
    """A CLIP vision model: CLS and patches."""
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


def random_dinov2(*, hidden: int, layers: int, heads: int, image_size: int, patch_size: int) -> Any:
    """A DINOv2 model."""
    config = Dinov2Config(
        hidden_size=hidden,
        mlp_ratio=2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    return Dinov2Model(config)


def random_pix2struct(*, hidden: int, layers: int, heads: int, side: int, patch_size: int) -> Any:
    """A Pix2Struct vision encoder for at most ``side`` patches in a row or column."""
    config = Pix2StructVisionConfig(
        hidden_size=hidden,
        patch_embed_hidden_size=3 * patch_size**2,
        d_ff=2 * hidden,
        d_kv=hidden // heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        seq_len=side + 1,  # row and column 0 are padding
        dropout_rate=0.0,
        attention_dropout=0.0,
        initializer_range=0.05,  # 1e-10 by default, from which it hardly learns
    )
    return Pix2StructVisionModel(config)


def random_llama(*, vocabulary: int, hidden: int, layers: int, heads: int, length: int) -> Any:
    """A Llama decoder with MLPs of twice its width, which says what it reads: its head is its embedding.

    Its token 0 pads, and its token 1 ends a text.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(
            5
        )  # 0.1 in place of 0.02: beside a width of thousands it is small
    return model
