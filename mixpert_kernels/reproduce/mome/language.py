"""The language model: a small Llama, trained on text alone, then frozen.

In the place of an image it is told what the image shows: a thing (or a letter) takes one of the positions that visual
tokens will have, as the sum of its words' embeddings; the other positions say that there is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpert_kernels.hf.random_models import random_llama

from ..training import MAX_NORM, warm_cosine
from .settings import Settings
from .tasks import ASKED, BLANK, GROUPS, IDS, LENGTH, VOCABULARY, Facts, ask, encode, facts_of

BATCH = 32
WORDS = 4  # of a thing at most
Progress = Callable[[int], None]


def new_language_model(settings: Settings, seed: int) -> Any:
    """A Llama with random weights, always the same for a seed."""
    torch.manual_seed(10_000 + seed)
    return random_llama(
        vocabulary=len(VOCABULARY),
        hidden=settings.llm,
        layers=settings.llm_layers,
        heads=settings.heads,
        length=settings.tokens + LENGTH,
    )


def train_language_model(settings: Settings, seed: int, progress: Progress) -> Any:
    """Train a language model on questions about images that are told and not seen."""
    model = new_language_model(settings, seed).train()
    rng = np.random.default_rng((seed, 1))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.llm_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(settings.llm_steps))
    for _ in range(settings.llm_steps):
        told, ids, labels = tell(BATCH, rng, settings)
        asked, logits = labels != -100, answer(model, told, ids)
        loss = F.cross_entropy(logits[asked], labels[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        progress(BATCH)
    return model.eval()


def tell(count: int, rng: np.random.Generator, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Questions of all groups in turn, about things that are told: (B, tokens, WORDS), (B, LENGTH), (B, LENGTH)."""
    told = np.zeros((count, settings.tokens, WORDS), np.int64)
    told[:, :, 0] = IDS[BLANK]
    encoded = []
    for b in range(count):
        group = GROUPS[b % len(GROUPS)]
        kind = ASKED[group][int(rng.integers(len(ASKED[group])))]
        facts = facts_of(kind, int(rng.integers(1 << 20)), rng)
        for place, words in zip(*_places(facts, rng, settings.tokens), strict=True):
            told[b, place] = [IDS[word] for word in words] + (WORDS - len(words)) * [0]
        encoded.append(encode(ask(group, facts, rng)))
    ids, labels = zip(*encoded, strict=True)
    return torch.from_numpy(told), torch.tensor(ids), torch.tensor(labels)


def _places(facts: Facts, rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, list]:
    """Where things are told: letters in their order, all else in any."""
    things = facts.described()
    places = rng.choice(tokens, len(things), replace=False)
    return (np.sort(places) if facts.kind == "page" else places), things


def answer(model: Any, told: Tensor, ids: Tensor) -> Tensor:
    """Logits (B, LENGTH, V) for what is said at each position, by what is told and asked before it."""
    embedding = model.get_input_embeddings()
    words = embedding(told) * (told > 0)[..., None]
    prefix = words.sum(2)
    hidden = model.model(inputs_embeds=torch.cat([prefix, embedding(ids)], 1)).last_hidden_state
    return model.lm_head(hidden[:, told.shape[1] - 1 : -1])


@torch.no_grad()
def measure(model: Any, seed: int, settings: Settings, count: int = 2_000) -> dict[str, float]:
    """Percent of questions of each group answered right, about things that are told."""
    told, ids, labels = tell(count, np.random.default_rng((seed, 2)), settings)
    parts = zip(told.split(200), ids.split(200), strict=True)
    logits = torch.cat([answer(model, *part) for part in parts])
    right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
    return {
        group: 100 * float(right[i :: len(GROUPS)].float().mean()) for i, group in enumerate(GROUPS)
    }
