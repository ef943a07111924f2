"""MomeForConditionalGeneration: an LLM that sees through several vision experts, with language experts in its FFNs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixpert_kernels.modules.mole import ADAPTER, Instruction, MixtureOfLanguageExperts
from mixpert_kernels.modules.move import Features, MixtureOfVisionExperts

from .processor import Processor
from .sentence import Embed, embed

NAME = "MomeForConditionalGeneration"
IGNORED = -100  # the label of what is not learnt

Images = Mapping[str, Mapping[str, Any] | Features]
Instructions = Sequence[str] | Tensor  # B texts, or their embeddings (B, S)


class Prompt(NamedTuple):
    """What the LLM is called with: the text's tokens, and the L visual ones of each sample where they belong.

    Attributes:
        inputs_embeds: (B, T', D).
        attention_mask: (B, T').
        labels: (B, T'), -100 at visual tokens; None without labels.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None


class MomeForConditionalGeneration(nn.Module):
    """MoVE, then a transformers LLM, with or without MoLE. ``mome.build`` makes it.

    The visual tokens of a sample come in the place of its one token ``image_token_id``; where that is None, in front of
    the sample's first token, after any padding at the left. Logits, the attention mask and labels are of the longer
    sequence, of T - 1 + L or T + L tokens.

    Args:
        llm: a causal LM of transformers; with or without language experts.
        move: the vision experts.
        instruction: where the LLM's language experts look; None: it has none.
        sentence_encoder: from B texts to embeddings (B, S); None: instructions are given as embeddings.
        image_token_id: of the placeholder, which need not be in the LLM's vocabulary.
        processor: of the images, for ``processor(images)``.
        options: of each branch, as it was made, for saving.
        sources: the directories that ``llm``, the branches and ``sentence_encoder`` came from, where they did.

    Attributes:
        llm, move, instruction, sentence_encoder, image_token_id, processor: the arguments.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        move: MixtureOfVisionExperts,
        *,
        instruction: Instruction | None = None,
        sentence_encoder: Embed | None = None,
        image_token_id: int | None = None,
        processor: Processor | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        sources: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__()
        self.llm, self.move, self.instruction = llm, move, instruction
        self.sentence_encoder = sentence_encoder
        self.image_token_id = image_token_id
        self.processor = processor
        self.options = {name: dict(of) for name, of in (options or {}).items()}
        self.sources = dict(sources or {})

    @property
    def config(self) -> Any:
        """The LLM's configuration."""
        return self.llm.config

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @property
    def branches(self) -> list[str]:
        """Names of the vision experts, in the order of the router's weights."""
        return list(self.move.branches)

    @property
    def layers(self) -> list[MixtureOfLanguageExperts]:
        """The language experts, first layer first; empty where there are none."""
        return [m for m in self.llm.modules() if isinstance(m, MixtureOfLanguageExperts)]

    @property
    def experts(self) -> int:
        """K, how many adapters each layer has; 0 where there are none."""
        layers = self.layers
        return layers[0].experts if layers else 0

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        *,
        images: Images | None = None,
        instructions: Instructions | None = None,
        **options: Any,
    ) -> Any:
        """Run the LLM on text and images.

        Args:
            input_ids: the text, with one placeholder a sample where the model has one.
            attention_mask: 0 at padding; None: there is none.
            labels: -100 where nothing is learnt.
            images: by branch, the inputs of its encoder for B images, as ``processor`` makes them, or their
                ``Features``; None: text alone, without placeholders.
            instructions: one a sample: texts, or embeddings (B, S). They choose the experts; the LLM reads
                ``input_ids`` alone. May be None where no expert is asked.
            options: of the LLM's own forward.

        Returns:
            The LLM's output, its logits of the longer sequence, with ``loss`` where there are labels.

        Raises:
            ValueError: another number of instructions or images than of samples, a branch without images, or another
                number of placeholders than one a sample. Placeholders are counted on a CPU; on a GPU a wrong number
                is a failed assertion of the device.
        """
        embedding = self._embedding(instructions, len(input_ids))
        prompt = self.prompt(input_ids, attention_mask, labels, images, embedding)
        with self._given(embedding):
            return self.llm(**prompt._asdict(), **options)

    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        images: Images | None = None,
        instructions: Instructions | None = None,
        **options: Any,
    ) -> Any:
        """Generate, with beams or without; prompts of different lengths are padded at the left.

        Args:
            input_ids, attention_mask, images, instructions: as of ``forward``.
            options: of the LLM's own ``generate``.

        Returns:
            What the LLM's ``generate`` returns for embeddings: the new tokens alone, without the prompt's.

        Raises:
            ValueError: as ``forward``.
        """
        with torch.no_grad():
            embedding = self._embedding(instructions, len(input_ids))
            prompt = self.prompt(input_ids, attention_mask, None, images, embedding)
        inputs = {
            "inputs_embeds": prompt.inputs_embeds,
            "attention_mask": prompt.attention_mask,
        }
        with self._given(embedding):
            return self.llm.generate(**inputs, **options)

    def prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images | None = None,
        embedding: Tensor | None = None,  # (B, S)
    ) -> Prompt:
        """Embed the text, and put the visual tokens where they belong."""
        if input_ids.ndim != 2:
            raise ValueError(f"{NAME}: input_ids must be (B, T), got {tuple(input_ids.shape)}")
        device = self.device
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{NAME}: {name} must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                    f"{tuple(given.shape)}"
                )
        holders = self._holders(input_ids, images is not None).to(device)
        ids = input_ids.to(device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(device)
        labels = None if labels is None else labels.to(device)
        text = self.llm.get_input_embeddings()(ids.masked_fill(holders, 0))
        if images is None:
            return Prompt(text, mask, labels)
        visual = self._visual(images, embedding, len(ids)).to(text.device, text.dtype)
        if self.image_token_id is None:
            taken, first = 0, mask.bool().int().argmax(1)
        else:
            taken, first = 1, holders.int().argmax(1)
        order = _order(ids.shape[1], visual.shape[1], first, taken)
        wide = order[..., None].expand(-1, -1, text.shape[2])
        seen = mask.new_ones(visual.shape[:2])
        if labels is not None:
            labels = torch.cat([labels, labels.new_full(visual.shape[:2], IGNORED)], 1)
        return Prompt(
            torch.cat([text, visual], 1).gather(1, wide),
            torch.cat([mask, seen], 1).gather(1, order),
            None if labels is None else labels.gather(1, order),
        )

    def embed(self, instructions: Instructions) -> Tensor:
        """Embeddings (B, S) of instructions, on the model's device.

        Raises:
            ValueError: they are neither texts nor embeddings of that width.
        """
        given = embed(NAME, self.sentence_encoder, instructions, self.move.sentence_width)
        return given.to(self.device)

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that train, by group and name.

        Groups: ``transforms`` and ``projections`` of the branches (with their norms), ``move_router``, ``adapters``,
        ``mole_routers``, and ``other``, which the user unfroze. A group without any is left out.
        """
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(group_of(name, self), {})[name] = parameter
        return groups

    def freeze(self) -> None:
        """Let the vision experts' transforms and projections, the adapters and the routers train, and nothing else."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(group_of(name, self) != "other")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What ``build`` added to the LLM and the encoders, whether it trains or not, by name."""
        named = dict(self.named_parameters())
        return {name: p for name, p in named.items() if group_of(name, self) != "other"}

    def _embedding(self, instructions: Instructions | None, batch: int) -> Tensor | None:
        if instructions is None:
            return None
        count = len(instructions)
        if not isinstance(instructions, str) and count != batch:
            raise ValueError(f"{NAME}: instructions must be one a sample, {batch}, got {count}")
        return self.embed(instructions)

    def _given(self, embedding: Tensor | None) -> contextlib.AbstractContextManager:
        if self.instruction is None:
            return contextlib.nullcontext()
        if embedding is not None:
            return self.instruction.given(embedding)
        if self.experts > 1:
            raise ValueError(f"{NAME}: instructions must be given to choose adapters, got None")
        return contextlib.nullcontext()

    def _holders(self, input_ids: Tensor, seen: bool) -> Tensor:  # (B, T) bool
        if self.image_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        holders = input_ids == self.image_token_id
        counts, wanted = holders.sum(1), int(seen)
        if counts.device.type == "cpu":
            wrong = [n for n in counts.tolist() if n != wanted]
            if wrong:
                with_images = (
                    "one placeholder a sample" if seen else "no placeholder without images"
                )
                raise ValueError(
                    f"{NAME}: input_ids must have {with_images}, token {self.image_token_id}, got {wrong[0]}"
                )
        elif counts.device.type == "cuda":
            torch._assert_async((counts == wanted).all())
        return holders

    def _visual(self, images: Images, embedding: Tensor | None, batch: int) -> Tensor:  # (B, L, D)
        if embedding is None and self.move.router is not None:
            raise ValueError(f"{NAME}: instructions must be given with images, got None")
        if embedding is not None:
            embedding = embedding.to(next(self.move.parameters()).device)
        visual = self.move(images, embedding)
        if len(visual) != batch:
            raise ValueError(f"{NAME}: images must be one a sample, {batch}, got {len(visual)}")
        return visual


def group_of(name: str, model: nn.Module) -> str:
    """The group of a parameter by its name in a model, see ``trainable``."""
    if name.startswith("move.router."):
        return "move_router"
    if name.startswith("move.branches."):
        part = name.split(".")[3]
        return {"transform": "transforms", "norm": "projections", "proj": "projections"}.get(
            part, "other"
        )
    owner, _, last = name.rpartition(".")
    if last in ADAPTER and isinstance(model.get_submodule(owner), MixtureOfLanguageExperts):
        return "adapters"
    owner, found, _ = name.rpartition(".router.")
    if found and isinstance(model.get_submodule(owner), MixtureOfLanguageExperts):
        return "mole_routers"
    return "other"


def _order(text: int, visual: int, first: Tensor, taken: int) -> Tensor:
    """Indices (B, T') into a sample's text, then its visual tokens: these replace ``taken`` words at ``first``."""
    place = torch.arange(text - taken + visual, device=first.device)
    after = place - first[:, None]  # (B, T'): 0 at the first visual token
    words = torch.where(after < 0, place, place - visual + taken)
    return torch.where((after >= 0) & (after < visual), text + after, words)
