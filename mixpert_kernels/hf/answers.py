"""Questions and answers as tokens, and the loss on the answers' alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mixpert_kernels.training.data import Sample

IGNORED = -100  # the label of a token that is no answer


class Answers(NamedTuple):
    """What a language model made of I answers.

    Attributes:
        losses: (I,) float32, each answer's cross-entropy, summed over its tokens.
        counts: (I,) int64, how many tokens that were.
        correct: (I,) bool: every token of the answer right given those before it, as greedy decoding would have it.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor


def tokenized(tokenizer: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Each sample's question, a line break, its answer, and the end token where the tokenizer has one.

    Returns:
        ``tokens`` (I, N) padded to the right, ``labels`` (I, N), -100 where there is no answer, and ``mask`` (I, N).

    Raises:
        ValueError: an answer has no token.
    """
    rows = [_tokens(tokenizer, sample) for sample in samples]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    pad = tokenizer.pad_token_id or 0  # any token: it is masked
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"tokens": tokens, "labels": labels, "mask": mask}


def answers(
    logits: Tensor,  # (I, P + N, V)
    labels: Tensor,  # (I, N)
) -> Answers:
    """Compare what a model predicts behind P tokens of an image, P > 0, with the labels of the N that follow."""
    first = logits.shape[1] - labels.shape[1]
    ahead = logits[:, first - 1 : -1].float()  # (I, N, V): what comes at each place
    losses = F.cross_entropy(
        ahead.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    ).sum(1)
    answer = labels != IGNORED
    correct = ((ahead.argmax(-1) == labels) | ~answer).all(1)
    return Answers(losses, answer.sum(1), correct)


def _tokens(tokenizer: Any, sample: Sample) -> tuple[list[int], list[int]]:
    prompt = tokenizer(f"{sample.prompt}\n", add_special_tokens=False).input_ids
    answer = tokenizer(sample.text, add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    if not answer:
        raise ValueError(f"train: answer of {sample.name} must have a token, got none")
    return prompt, answer
