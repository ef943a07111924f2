"""What stands on a tower in training: a classifier, or a language model that reads its features as a prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .answers import answers, tokenized
from .loading import (
    Preprocess,
    kind_of,
    load_preprocessing,
    load_tower,
    load_vision_model,
    one_line,
    random_siglip,
)
from .tower import FusedMixpertTower

if TYPE_CHECKING:
    from mixpert_kernels.training.data import Sample
    from mixpert_kernels.training.recipe_model import Model


class HeadOutput(NamedTuple):
    """What a batch of I images came to.

    Attributes:
        losses: (I,) float32, each image's cross-entropy, summed over its tokens.
        counts: (I,) int64, how many tokens that were; 1 for a classifier.
        correct: (I,) bool: the right class, or every token of the answer right given those before it, as greedy
            decoding would have it.
        expert: (I,) int64, the expert each image went to.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor
    expert: Tensor


class Classifier(nn.Module):
    """The mean of the tower's features, and a linear layer over the classes.

    Args:
        tower: the tower.
        classes: the labels, in the order of the logits.
    """

    def __init__(self, tower: FusedMixpertTower, classes: Sequence[str]) -> None:
        super().__init__()
        self.tower, self.classes = tower, list(classes)
        self.head = nn.Linear(tower.config.hidden_size, len(self.classes))

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What ``forward`` takes besides the pixels, on the CPU: the classes of the samples' labels."""
        return {"labels": torch.tensor([self.classes.index(str(s.label)) for s in samples])}

    def logits(self, features: Tensor) -> Tensor:
        """Features (I, T, P) to logits (I, C)."""
        return self.head(features.mean(1))

    def forward(
        self,
        pixel_values: Tensor,  # (I, C, H, W)
        labels: Tensor,  # (I,)
        expert: Tensor | None = None,  # (I,)
    ) -> HeadOutput:
        """Classify; ``expert`` forces the routes, None lets the router decide."""
        out = self.tower(pixel_values, expert=expert, output_router=False)
        logits = self.logits(out.last_hidden_state).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return HeadOutput(losses, torch.ones_like(labels), logits.argmax(-1) == labels, out.expert)

    def save_head(self, directory: Path) -> None:
        """Write the linear layer and the classes' names."""
        state = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(state, directory / "classifier.safetensors")
        (directory / "classes.json").write_text(json.dumps(self.classes), encoding="utf-8")

    @classmethod
    def from_run(cls, directory: Path | str) -> Classifier:
        """Load what a training run left in its output directory, for inference.

        Raises:
            ValueError: there is no tower or no classifier in it.
        """
        directory = Path(directory)
        tower = load_tower(directory / "tower")
        with one_line("Classifier", directory / "head", "a saved classifier"):
            classes = json.loads((directory / "head" / "classes.json").read_text(encoding="utf-8"))
            model = cls(tower, classes)
            model.head.load_state_dict(load_file(directory / "head" / "classifier.safetensors"))
        return model.eval()


class PrefixLM(nn.Module):
    """A causal language model that reads the tower's features in the place of its first token embeddings.

    The sequence is the image's features, the question and a line break, the answer, and the end token where the
    tokenizer has one. The loss is on the answer and the end token alone.

    Args:
        tower: its features are as wide as the language model's embeddings.
        language: any ``AutoModelForCausalLM`` that takes ``inputs_embeds``.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the widths differ.
    """

    def __init__(self, tower: FusedMixpertTower, language: Any, tokenizer: Any) -> None:
        super().__init__()
        width = language.get_input_embeddings().weight.shape[1]
        if tower.config.hidden_size != width:
            raise ValueError(
                f"PrefixLM: model.projector must be {width}, the language model's width, got {tower.config.hidden_size}"
            )
        self.tower, self.language, self.tokenizer = tower, language, tokenizer

    def targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What ``forward`` takes besides the pixels, on the CPU: tokens (I, N) padded to the right, and labels."""
        return tokenized(self.tokenizer, samples)

    def forward(
        self,
        pixel_values: Tensor,  # (I, C, H, W)
        tokens: Tensor,  # (I, N)
        labels: Tensor,  # (I, N)
        mask: Tensor,  # (I, N)
        expert: Tensor | None = None,  # (I,)
    ) -> HeadOutput:
        """Predict each answer's tokens from those before them; ``expert`` forces the routes."""
        out = self.tower(pixel_values, expert=expert, output_router=False)
        words = self.language.get_input_embeddings()(tokens)
        prefix = out.last_hidden_state.to(words.dtype)  # (I, T, P)
        seen = mask.new_ones(prefix.shape[:2])
        logits = self.language(
            inputs_embeds=torch.cat([prefix, words], 1),
            attention_mask=torch.cat([seen, mask], 1),
            use_cache=False,
        ).logits
        return HeadOutput(*answers(logits, labels), out.expert)

    def save_head(self, directory: Path) -> None:
        """Write the language model and its tokenizer, as transformers does."""
        self.language.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def build(settings: Model, classes: Sequence[str]) -> tuple[Classifier | PrefixLM, Preprocess]:
    """Build what a recipe's ``[model]`` describes, with a tower of one expert, in float32.

    New weights are drawn from torch's default generator.

    Args:
        settings: the recipe's model.
        classes: the labels of a classifier.

    Returns:
        The model, in eval mode, and what turns images into its pixels.

    Raises:
        ValueError: a directory is missing or holds something else, or sizes do not fit.
    """
    if settings.vision is not None:
        refuse_experts(settings.vision)
        vision, projector = load_vision_model(settings.vision, dtype=torch.float32)
    else:
        vision, projector = _random_vision(settings.siglip), None
    language, width = None, settings.projector
    if settings.language is not None:
        language, tokenizer = load_language(settings.language)
        words = language.get_input_embeddings().weight.shape[1]
        width = words if width is None and projector is None else width
    if width is not None:
        first = nn.Linear(vision.config.hidden_size, width)
        projector = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
    tower = FusedMixpertTower.from_vision_model(
        vision,
        projector,
        num_experts=1,
        expert_layers=settings.expert_layers,
        routing=settings.routing,
        against=settings.against,
        feature_layer=settings.feature_layer,
        router_hidden=settings.router_hidden,
    )
    if tower.config.projector is not None and tower.config.projector["kind"] == "custom":
        raise ValueError(
            f"train: model.projector must be given, for that of {settings.vision} can't be saved, got none"
        )
    preprocess = load_preprocessing(settings.vision, vision.config)
    if language is None:
        return Classifier(tower, classes).eval(), preprocess
    return PrefixLM(tower, language, tokenizer).eval(), preprocess


_HAS_EXPERTS = {
    "tower": "the tower {}: give the checkpoint that it was made from, of which stage clone makes the experts",
    "mixpertized": "{}, a vision-language model with experts: train that in a loop of your own (docs/mllm.md, "
    "Training), or give the model that it was made from, of which a tower is trained",
}


def refuse_experts(directory: Path) -> None:
    """Raise ValueError, which says what to do, if a checkpoint to be trained has experts."""
    kind = kind_of("train", directory)
    if kind in _HAS_EXPERTS:
        raise ValueError(
            "train: model.vision must be a checkpoint without experts, got "
            + _HAS_EXPERTS[kind].format(directory)
        )


def _random_vision(sizes: Any) -> nn.Module:
    return random_siglip(
        hidden=sizes.hidden,
        intermediate=sizes.intermediate or 4 * sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )


def load_language(directory: Path) -> tuple[nn.Module, Any]:
    """Load a causal language model, in float32 and in eval mode, and its tokenizer; ValueError if it is none."""
    with one_line("train", directory, "a causal language model with its tokenizer"):
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        AutoConfig.from_pretrained(directory, **local)
        language, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, **local
        )
        if report["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"without {min(report['missing_keys'])}")
        return language.eval(), AutoTokenizer.from_pretrained(directory, **local)
