"""How much is trained on how many images: the numbers that fix a run of the MoME comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from .data import Part
from .tasks import KINDS

SHARES = {"scene": 1.0, "chart": 0.5, "page": 1.0}  # of ``train`` and of ``test``


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths, each the same for all arms.

    Attributes:
        seeds: how many times everything is repeated, with other weights and other images.
        encoder: C, width of every vision encoder.
        encoder_layers: of every vision encoder.
        llm: D, width of the language model.
        llm_layers: of the language model.
        heads: of the attention of all of them.
        size: side of the grid of visual tokens: size * size of them, and one of the whole image.
        adt_layers: of the adaptive deformable transformation.
        adt_ffn: width of its MLPs.
        points: that a head samples.
        experts: K, adapters an FFN.
        adapter: H, hidden width of an adapter.
        train: scenes and pages to train on, and half as many charts.
        test: to test on, likewise.
        encoder_steps: of clip's, dino's and pix's own training.
        llm_steps: of the language model's own training, on text.
        steps: of stage 1.
        more_steps: of stage 2.
        each: questions of each group a step: REC and REG take longest to learn.
        encoder_rate: peak learning rate of an encoder's own training.
        llm_rate: of the language model's.
        rate: of stage 1.
        more_rate: of stage 2.
        tuned_rate: of the language model in stage 1.
        decay: weight decay.
    """

    seeds: int = 3
    encoder: int = 48
    encoder_layers: int = 3
    llm: int = 64
    llm_layers: int = 2
    heads: int = 4
    size: int = 4
    adt_layers: int = 2
    adt_ffn: int = 96
    points: int = 4
    experts: int = 4
    adapter: int = 8
    train: int = 6_000
    test: int = 1_000
    encoder_steps: tuple[int, ...] = (1_200, 1_000, 800)
    llm_steps: int = 3_000
    steps: int = 900
    more_steps: int = 400
    each: tuple[int, ...] = (8, 24, 24, 8)
    encoder_rate: float = 3e-3
    llm_rate: float = 3e-3
    rate: float = 3e-3
    more_rate: float = 2e-3
    tuned_rate: float = 1e-3
    decay: float = 0.05

    def split(self, split: str) -> list[Part]:
        """The images of a split, in the order in which they are counted."""
        size = self.train if split == "train" else self.test
        return [Part(kind, split, round(size * SHARES[kind])) for kind in KINDS]

    def parts(self) -> list[Part]:
        """Everything that a seed needs rendered."""
        return self.split("train") + self.split("test")

    @property
    def tokens(self) -> int:
        """Visual tokens of an image, the one of the whole image included."""
        return self.size**2 + 1

    @property
    def batch(self) -> int:
        """Questions a step."""
        return sum(self.each)


FULL = Settings()
QUICK = Settings(
    seeds=1,
    train=1_000,
    test=200,
    encoder_steps=(100, 100, 100),
    llm_steps=100,
    steps=60,
    more_steps=30,
)
