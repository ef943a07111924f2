"""A MoME model as a recipe trains it: images, instructions and answers in, each answer's loss out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from mixpert_kernels.hf.answers import Answers, answers, tokenized
from mixpert_kernels.hf.loading import one_line

from .build import build
from .model import MomeForConditionalGeneration
from .processor import Processor
from .saving import save

if TYPE_CHECKING:
    from mixpert_kernels.training.data import Sample
    from mixpert_kernels.training.recipe_model import Model

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class MomeLearner(nn.Module):
    """A MoME model with its LLM's tokenizer.

    The LLM reads the visual tokens, the instruction and a line break, the answer, and the end token where the tokenizer
    has one. The loss is on the answer and the end token alone.

    Args:
        model: that trains; its LLM and its encoders stay in eval mode.
        tokenizer: of its LLM.
    """

    def __init__(self, model: MomeForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def train(self, mode: bool = True) -> MomeLearner:
        """The vision mixture's dropout is on in training; what is frozen draws nothing."""
        super().train(mode)
        self.model.llm.eval()
        return self

    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """Embeddings (I, S) of the samples' instructions, on the model's device."""
        return self.model.embed([str(sample.prompt) for sample in samples])

    @torch.no_grad()
    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What ``forward`` takes besides the images: tokens (I, N) padded to the right, labels, and embeddings."""
        return {**tokenized(self.tokenizer, samples), "instructions": self.embed(samples)}

    def forward(
        self,
        images: dict[str, dict[str, Tensor]],
        tokens: Tensor,  # (I, N)
        labels: Tensor,  # (I, N)
        mask: Tensor,  # (I, N)
        instructions: Tensor,  # (I, S)
    ) -> Answers:
        """Predict each answer's tokens from those before them."""
        out = self.model(tokens, mask, images=images, instructions=instructions, use_cache=False)
        return answers(out.logits, labels)

    def save(self, directory: Path) -> None:
        """Write the model for ``mome.load``, and the tokenizer to ``tokenizer/``."""
        save(self.model, directory, tokenizer=self.tokenizer)


def build_learner(settings: Model) -> tuple[MomeLearner, Processor]:
    """Build what a recipe's ``[model]`` describes, with one adapter beside each FFN.

    Frozen parts keep the dtype that they were saved in; what trains is float32. New weights are drawn from torch's
    default generator.

    Returns:
        The model, in eval mode, and what turns images into its branches' inputs.

    Raises:
        ValueError: a directory is missing or holds something else, or an encoder's has no image processor.
    """
    mome, language = settings.mome, settings.language
    assert mome is not None and language is not None  # as the recipe was checked
    _check_directory("model.language", language)
    _check_directory("model.mome.sentence", mome.sentence)
    for name, encoder in mome.encoders.items():
        _check_directory(f"model.mome.encoders.{name}", encoder)
    with one_line("train", language, "a causal language model with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(language, **LOCAL)
    model = build(
        language,
        mome.encoders,
        sentence_encoder=mome.sentence,
        experts=1,
        hidden=mome.hidden,
        mix=mome.mix,
        options=mome.options.given,
        branches={name: branch.given for name, branch in mome.branches.items()},
        size=mome.size,
        dtype=torch.float32,
    )
    processor = model.processor
    for name in model.branches:
        if processor is None or name not in processor.processors:
            raise ValueError(
                f"train: model.mome.encoders.{name} must have an image processor beside it, got none in "
                f"{mome.encoders[name]}"
            )
    return MomeLearner(model, tokenizer), processor


def _check_directory(key: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"train: {key} must be a directory, got {path}")
