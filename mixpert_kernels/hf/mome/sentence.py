"""Instructions to embeddings: a sentence encoder from a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mixpert_kernels.hf.loading import LOCAL, directory_of, one_line, quiet

Embed = Callable[[list[str]], Tensor]  # B texts -> (B, width)


class SentenceEncoder(nn.Module):
    """A frozen BERT or MiniLM: the mean over a text's tokens of the last hidden state, of length 1.

    This is what all-MiniLM-L6-v2 computes, whose width is 384. Texts are cut at the length that the directory's
    ``sentence_bert_config.json`` gives, or at what the model has positions for.

    Args:
        directory: of a transformers checkpoint with its tokenizer. Nothing is downloaded.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.

    Raises:
        ValueError: the directory is missing, or is no such checkpoint.
    """

    def __init__(self, directory: Path | str, dtype: torch.dtype | str = "auto") -> None:
        super().__init__()
        self.directory = directory = directory_of("SentenceEncoder", directory)
        wanted = "a transformers text encoder and tokenizer"
        with quiet(), one_line("SentenceEncoder", directory, wanted):
            self.tokenizer = AutoTokenizer.from_pretrained(directory, **LOCAL)
            model, report = AutoModel.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, **LOCAL
            )
            missing = [name for name in report["missing_keys"] if "pooler." not in name]
            if missing:
                raise ValueError(f"no {', '.join(sorted(missing)[:3])}")
            self.length = _length(directory, model.config, self.tokenizer)
        self.model = model.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> SentenceEncoder:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: B of them.

        Returns:
            (B, width) float32, of length 1, on the model's device.
        """
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**inputs).last_hidden_state.float()  # (B, T, width)
        mask = inputs["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the model, its tokenizer and the length at which it cuts."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        settings = {"max_seq_length": self.length}
        (Path(directory) / "sentence_bert_config.json").write_text(json.dumps(settings))


def embed(caller: str, encoder: Embed | None, instructions: Any, width: int) -> Tensor:
    """Embeddings (B, width) of instructions: given as such, or as texts for ``encoder``.

    Raises:
        ValueError: neither, or of another width.
    """
    if isinstance(instructions, str):
        raise ValueError(f"{caller}: instructions must be a list of texts, one a sample, got a str")
    if not isinstance(instructions, Tensor):
        texts = list(instructions)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{caller}: instructions must be texts, one a sample, got {texts[:3]}")
        if encoder is None:
            raise ValueError(
                f"{caller}: instructions must be embeddings (B, {width}) where no sentence encoder is given and the "
                "model has none, got texts"
            )
        instructions, count = encoder(texts), len(texts)
        if instructions.shape != (count, width):
            raise ValueError(
                f"{caller}: sentence_encoder must give ({count}, {width}), got {tuple(instructions.shape)}"
            )
    if instructions.ndim != 2 or instructions.shape[1] != width:
        raise ValueError(
            f"{caller}: instructions must be (B, {width}), got {tuple(instructions.shape)}"
        )
    return instructions


def _length(directory: Path, config: Any, tokenizer: Any) -> int:
    path = directory / "sentence_bert_config.json"
    stated = json.loads(path.read_text()).get("max_seq_length") if path.is_file() else None
    positions = getattr(config, "max_position_embeddings", None)
    return min(n for n in (stated, positions, tokenizer.model_max_length) if n is not None)
