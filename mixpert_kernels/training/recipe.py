"""A training run's settings: read from TOML, every fault named before any work."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._settings import flat, one_of, parse, require, toml
from .mome_stages import MOME_STAGES
from .recipe_model import Model
from .stages import STAGES

PRECISIONS = ("fp32", "bf16")
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine")
DEVICES = ("auto", "cpu", "cuda")
ON_BAD_IMAGE = ("skip", "fail")
BEFORE_CLONE = ("alignment", "knowledge", "joint", "move")
# The experts' and the router's rates are EMMA's, by the author of Mixpert; the other three are ours.
RATES = {"alignment": 1e-3, "knowledge": 1e-5, "joint": 1e-5, "experts": 4e-6, "router": 1e-4}
# What the MoME paper gives, of its first stage; that the second is like it is ours.
MOME_RECIPE = {"steps": 30_000, "batch": 64, "lr": 5e-4, "weight_decay": 0.05, "warmup": 1000}
ROUTER_KEYS = ("name", "steps", "lr", "weight_decay")
FREE_KEYS = ("output", "parallel", "device", "data.workers")  # a resumed run may change these


@dataclass(frozen=True)
class Data:
    """Where the images are; see ``training.data.read_images`` for the forms.

    Attributes:
        train: images to learn from.
        experts: the experts' names; the first is the versatile one, each other a domain. They name the metrics, the
            results and, in the saved tower's configuration, the experts. Not for MoME, whose experts have no domains.
        test: images to evaluate on at the end; None for no evaluation.
        held_out: images to calibrate on.
        on_bad_image: what an image that cannot be read does: ``skip`` or ``fail``.
        workers: processes that decode images; 0: the training process does.
    """

    train: Path
    experts: list[str] | None = None
    test: Path | None = None
    held_out: Path | None = None
    on_bad_image: str = "skip"
    workers: int = 0

    def __post_init__(self) -> None:
        names = self.experts
        if names is not None:
            require(len(names) >= 2, "data.experts", "be at least two names", names)
            given = all(name.strip() for name in names) and len(set(names)) == len(names)
            require(given, "data.experts", "be different names, none of them blank", names)
        one_of("data.on_bad_image", self.on_bad_image, ON_BAD_IMAGE)
        require(self.workers >= 0, "data.workers", "be at least 0", self.workers)


@dataclass(frozen=True)
class Stage:
    """One ``[[stage]]``.

    Attributes:
        name: one of ``STAGES``, or for MoME of ``MOME_STAGES``.
        steps: how many; none for ``clone``.
        batch: images a step, over all processes.
        lr: default: see ``RATES`` and ``MOME_RECIPE``, where ``move``'s and ``mole``'s other defaults are.
        weight_decay: of matrices; vectors, such as biases and gains, have none.
        optimizer: ``adamw`` (betas 0.9 and 0.999, eps 1e-8) or ``sgd`` (momentum 0.9).
        max_norm: of the gradients, each expert's own and the shared parameters'; 0: not clipped.
        schedule: ``constant`` or ``cosine`` (to 0 at ``steps``), over each expert's own steps; in ``move`` and ``mole``
            over the stage's.
        warmup: steps of linear warm-up before it.
    """

    name: str
    # None until __post_init__ has filled them in; what a stage does not take stays so.
    steps: int = None  # type: ignore[assignment]
    batch: int = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    weight_decay: float = None  # type: ignore[assignment]
    optimizer: str = None  # type: ignore[assignment]
    max_norm: float = None  # type: ignore[assignment]
    schedule: str = None  # type: ignore[assignment]
    warmup: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        one_of("stage.name", self.name, tuple(dict.fromkeys((*STAGES, *MOME_STAGES))))
        allowed = {"clone": ("name",), "router": ROUTER_KEYS}.get(self.name)
        for key, value in dataclasses.asdict(self).items():
            given = allowed is not None and key not in allowed and value is not None
            require(not given, f"stage.{key}", f"not be given for {self.name}", value)
        if self.name == "clone":
            return
        if self.name in MOME_STAGES:
            self._fill(**MOME_RECIPE, max_norm=0.0)
        require(self.steps is not None, "stage.steps", f"be given for {self.name}", self.steps)
        self._fill(lr=RATES.get(self.name), weight_decay=0.01)
        if self.name != "router":
            schedule = "constant" if self.name == "alignment" else "cosine"
            self._fill(batch=32, optimizer="adamw", max_norm=1.0, schedule=schedule, warmup=0)
            one_of("stage.optimizer", self.optimizer, OPTIMIZERS)
            one_of("stage.schedule", self.schedule, SCHEDULES)
        for name, least in {
            "steps": 1,
            "batch": 1,
            "weight_decay": 0,
            "max_norm": 0,
            "warmup": 0,
        }.items():
            value = getattr(self, name)
            require(value is None or value >= least, f"stage.{name}", f"be at least {least}", value)
        require(0 < self.lr < math.inf, "stage.lr", "be positive", self.lr)
        warm = self.warmup is None or self.warmup < self.steps
        require(warm, "stage.warmup", f"be less than the {self.steps} steps", self.warmup)

    def _fill(self, **defaults: Any) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def factor(self, step: int) -> float:
        """What the rate is multiplied by at ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Calibrate:
    """``[calibrate]``: choose tau or delta on ``data.held_out``; see ``training.calibrate``."""

    max_errors: float = 0.05

    def __post_init__(self) -> None:
        inside = 0 <= self.max_errors <= 1
        require(inside, "calibrate.max_errors", "lie in [0, 1]", self.max_errors)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run.

    Attributes:
        output: directory for checkpoint, metrics and results.
        data: the images.
        model: the model.
        stages: run in order; ``[[stage]]`` in TOML.
        calibrate: None for no calibration.
        seed: of weights and order.
        precision: ``fp32`` or ``bf16`` (autocast; parameters stay float32).
        parallel: ``ddp`` or ``fsdp`` where there is more than one process.
        device: ``auto``, ``cpu`` or ``cuda``.
        checkpoint_every: steps between two checkpoints; each stage ends with one besides.
        log_every: steps between two rows of metrics.
    """

    output: Path
    data: Data
    model: Model
    stages: list[Stage] = field(metadata={"key": "stage"})
    calibrate: Calibrate | None = None
    seed: int = 0
    precision: str = "fp32"
    parallel: str = "ddp"
    device: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("parallel", self.parallel, PARALLEL)
        one_of("device", self.device, DEVICES)
        require(self.seed >= 0, "seed", "be at least 0", self.seed)
        for name in ("checkpoint_every", "log_every"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        self._check_order()
        self._check_system()
        if self.calibrate is not None:
            routes = any(stage.name == "router" for stage in self.stages)
            require(routes, "calibrate", "come with a router stage", "none")
            require(
                self.data.held_out is not None, "data.held_out", "be given to calibrate", "none"
            )
            threshold = self.model.routing != "direct"
            require(threshold, "model.routing", "have a threshold to calibrate", self.model.routing)

    def _check_order(self) -> None:
        require(bool(self.stages), "stage", "be given at least once", "none")
        names = [stage.name for stage in self.stages]
        require(names.count("clone") <= 1, "stage", "have clone once at most", names)
        cloned = False
        for name in names:
            early = name in BEFORE_CLONE
            wanted = "come before clone" if early else "come after clone"
            if name != "clone":
                require(early != cloned, f"stage {name}", wanted, names)
            cloned = cloned or name == "clone"

    def _check_system(self) -> None:
        """Data and stages must be of a tower, or of MoME."""
        experts = self.data.experts
        if self.model.mome is None:
            require(experts is not None, "data.experts", "be given", "none")
            stages = STAGES
        else:
            require(experts is None, "data.experts", "not be given for model.mome", experts)
            require(self.parallel == "ddp", "parallel", "be ddp for model.mome", self.parallel)
            stages = MOME_STAGES
        for stage in self.stages:
            one_of("stage.name of this model", stage.name, stages)

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a TOML file; the paths in it are relative to it.

        Raises:
            ValueError: the file is missing or no TOML, a key is unknown or missing, or a value is of the wrong type
                or out of range; the message names it.
        """
        path = Path(path)
        try:
            table = toml().loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"train: config must be a TOML file, got {path}: {reason}") from None
        return cls.from_dict(table, path.parent)

    @classmethod
    def from_dict(cls, table: dict[str, Any], base: Path | str = ".") -> Recipe:
        """Make a recipe of what a TOML file holds; paths are relative to ``base``."""
        return parse(cls, table, "", Path(base).resolve())

    def to_dict(self) -> dict[str, Any]:
        """Plain values by dotted key, to compare recipes and to save them."""
        return dict(flat(dataclasses.asdict(self)))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The dotted keys in which two recipes differ in what they train."""
    keys = sorted(old.keys() | new.keys())
    return [k for k in keys if k not in FREE_KEYS and old.get(k) != new.get(k)]
