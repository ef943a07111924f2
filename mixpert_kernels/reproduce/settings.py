"""How much is trained on how many images: the numbers that fix a run of the comparisons."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .ambiguous import AMBIGUOUS
from .data import DOMAINS, SIDE, Part

FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths, each the same for all methods.

    Attributes:
        seeds: how many times everything is repeated, with other weights and other images.
        hidden: D, width of the encoder.
        layers: of the encoder.
        heads: of its attention.
        intermediate: width of its MLPs.
        projector: P, width of the projector.
        patch: side of a patch in pixels.
        train: images a domain to train on.
        held_out: images a domain to calibrate thresholds on (half as many of each ambiguous kind).
        test: images a domain to test on (half as many of each ambiguous kind).
        joint_steps: of the joint stage.
        extra_steps: of what follows it.
        batch: images a step and domain.
        rate: peak learning rate from random weights.
        extra_rate: peak learning rate from the joint weights.
        decay: weight decay.
        routed: images a domain to train the router on.
        depths: numbers of cloned layers.
        cloned: that of the main comparison, one of ``depths``.
        rounds: of the timing.
        widths: of the pilot, which is then all there is.
    """

    seeds: int = 3
    hidden: int = 24
    layers: int = 4
    heads: int = 2
    intermediate: int = 48
    projector: int = 48
    patch: int = 8
    train: int = 24_000
    held_out: int = 1_000
    test: int = 4_000
    joint_steps: int = 4_000
    extra_steps: int = 1_000
    batch: int = 64
    rate: float = 3e-3
    extra_rate: float = 3e-3
    decay: float = 0.05
    routed: int = 2_000
    depths: tuple[int, ...] = (0, 1, 2, 3)
    cloned: int = 2
    rounds: int = 15
    widths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return (SIDE // self.patch) ** 2

    @property
    def pilot_steps(self) -> int:
        return self.joint_steps // 2

    def of_width(self, hidden: int) -> Settings:
        """The same with another width, MLPs and projector in proportion."""
        return replace(self, hidden=hidden, intermediate=2 * hidden, projector=2 * hidden)

    def parts(self) -> list[Part]:
        """Everything that a seed needs rendered."""
        counts = {"train": self.train, "held_out": self.held_out, "test": self.test}
        clean = [Part(kind, split, n) for split, n in counts.items() for kind in DOMAINS]
        mixed = [
            Part(kind, split, counts[split] // 2)
            for split in ("held_out", "test")
            for kind in AMBIGUOUS
        ]
        return clean + mixed

    def part(self, kind: str, split: str) -> Part:
        return next(p for p in self.parts() if (p.kind, p.split) == (kind, split))


FULL = Settings()
QUICK = Settings(
    seeds=1,
    train=5_000,
    held_out=300,
    test=600,
    joint_steps=400,
    extra_steps=150,
    routed=500,
    rounds=5,
)


def open_folder(folder: Path, settings: Any) -> None:
    """Make the output folder and note the settings in it, so that a later run goes on where this one ends.

    Raises:
        ValueError: the folder is a file, or holds a run with other settings.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"reproduce: out must be a directory, got the file {folder}")
    if path.is_file() and read_settings(folder, type(settings)) != settings:
        raise ValueError(
            f"reproduce: out must be empty or hold a run with the same settings, got {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")


def read_settings(folder: Path, kind: Any = Settings) -> Any:
    """The settings of the run in a folder, of that dataclass.

    Raises:
        ValueError: there is none.
    """
    path = folder / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return kind(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"reproduce: {path} must hold the settings of a run, got {error}"
        ) from None
