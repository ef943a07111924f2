"""A training run's settings: read from TOML, every fault named before any work."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stages import STAGES

PRECISIONS = ("fp32", "bf16")
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine")
DEVICES = ("auto", "cpu", "cuda")
ON_BAD_IMAGE = ("skip", "fail")
HEADS = ("classifier",)
BEFORE_CLONE = ("alignment", "knowledge", "joint")
# The experts' and the router's rates are EMMA's, by the author of Mixpert; the other three are ours.
RATES = {"alignment": 1e-3, "knowledge": 1e-5, "joint": 1e-5, "experts": 4e-6, "router": 1e-4}
ROUTER_KEYS = ("name", "steps", "lr", "weight_decay")
FREE_KEYS = ("output", "parallel", "device", "data.workers")  # a resumed run may change these


@dataclass(frozen=True)
class Data:
    """Where the images are; see ``training.data.read_images`` for the forms.

    Attributes:
        train: images to learn from.
        experts: the experts' names; the first is the versatile one, each other a domain. They name the metrics, the
            results and, in the saved tower's configuration, the experts.
        test: images to evaluate on at the end; None for no evaluation.
        held_out: images to calibrate on.
        on_bad_image: what an image that cannot be read does: ``skip`` or ``fail``.
        workers: processes that decode images; 0: the training process does.
    """

    train: Path
    experts: list[str]
    test: Path | None = None
    held_out: Path | None = None
    on_bad_image: str = "skip"
    workers: int = 0

    def __post_init__(self) -> None:
        names = self.experts
        _require(len(names) >= 2, "data.experts", "be at least two names", names)
        given = all(name.strip() for name in names) and len(set(names)) == len(names)
        _require(given, "data.experts", "be different names, none of them blank", names)
        _one_of("data.on_bad_image", self.on_bad_image, ON_BAD_IMAGE)
        _require(self.workers >= 0, "data.workers", "be at least 0", self.workers)


@dataclass(frozen=True)
class Siglip:
    """Sizes of a SigLIP vision model with random weights."""

    hidden: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    intermediate: int | None = None  # default: 4 hidden

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _require(value is None or value >= 1, f"model.siglip.{name}", "be at least 1", value)


@dataclass(frozen=True)
class Model:
    """The vision model, what becomes of it, and what stands on top.

    Attributes:
        vision: a transformers vision checkpoint; its own projector is used where it has one.
        siglip: sizes of a random one instead.
        projector: width of a new projector Linear-GELU-Linear; None: the checkpoint's own, or the language model's
            width, or none.
        expert_layers: how many last layers get experts.
        routing: ``direct``, ``score_threshold`` or ``score_difference``.
        against: the reference score of ``score_difference``.
        feature_layer: the hidden state that is the feature.
        router_hidden: width of the router's hidden layer; None for a linear router.
        head: ``classifier``: mean pooling and a linear layer over the training data's labels.
        language: a causal language model's directory with its tokenizer, for images with text.
    """

    vision: Path | None = None
    siglip: Siglip | None = None
    projector: int | None = None
    expert_layers: int = 2
    routing: str = "score_difference"
    against: str = "runner_up"
    feature_layer: int = -1
    router_hidden: int | None = None
    head: str | None = None
    language: Path | None = None

    def __post_init__(self) -> None:
        one = (self.vision is None) != (self.siglip is None)
        _require(one, "model", "have either vision or siglip", self._given("vision", "siglip"))
        one = (self.head is None) != (self.language is None)
        _require(one, "model", "have either head or language", self._given("head", "language"))
        if self.head is not None:
            _one_of("model.head", self.head, HEADS)
        width = self.projector
        _require(width is None or width >= 1, "model.projector", "be at least 1", width)

    def _given(self, *names: str) -> str:
        return " and ".join(name for name in names if getattr(self, name) is not None) or "neither"

    @property
    def kind(self) -> str:
        """What the head learns from: ``label`` or ``text``."""
        return "label" if self.language is None else "text"


@dataclass(frozen=True)
class Stage:
    """One ``[[stage]]``.

    Attributes:
        name: one of ``STAGES``.
        steps: how many; none for ``clone``.
        batch: images a step, over all processes.
        lr: default: see ``RATES``.
        weight_decay: of matrices; vectors, such as biases and gains, have none.
        optimizer: ``adamw`` (betas 0.9 and 0.999, eps 1e-8) or ``sgd`` (momentum 0.9).
        max_norm: of the gradients, each expert's own and the shared parameters'; 0: not clipped.
        schedule: ``constant`` or ``cosine`` (to 0 at ``steps``), over each expert's own steps.
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
        _one_of("stage.name", self.name, STAGES)
        allowed = {"clone": ("name",), "router": ROUTER_KEYS}.get(self.name)
        for key, value in dataclasses.asdict(self).items():
            given = allowed is not None and key not in allowed and value is not None
            _require(not given, f"stage.{key}", f"not be given for {self.name}", value)
        if self.name == "clone":
            return
        _require(self.steps is not None, "stage.steps", f"be given for {self.name}", self.steps)
        self._fill(lr=RATES[self.name], weight_decay=0.01)
        if self.name != "router":
            schedule = "constant" if self.name == "alignment" else "cosine"
            self._fill(batch=32, optimizer="adamw", max_norm=1.0, schedule=schedule, warmup=0)
            _one_of("stage.optimizer", self.optimizer, OPTIMIZERS)
            _one_of("stage.schedule", self.schedule, SCHEDULES)
        for name, least in {
            "steps": 1,
            "batch": 1,
            "weight_decay": 0,
            "max_norm": 0,
            "warmup": 0,
        }.items():
            value = getattr(self, name)
            _require(
                value is None or value >= least, f"stage.{name}", f"be at least {least}", value
            )
        _require(0 < self.lr < math.inf, "stage.lr", "be positive", self.lr)

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
        _require(inside, "calibrate.max_errors", "lie in [0, 1]", self.max_errors)


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
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("parallel", self.parallel, PARALLEL)
        _one_of("device", self.device, DEVICES)
        _require(self.seed >= 0, "seed", "be at least 0", self.seed)
        for name in ("checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        self._check_order()
        if self.calibrate is not None:
            routes = any(stage.name == "router" for stage in self.stages)
            _require(routes, "calibrate", "come with a router stage", "none")
            _require(
                self.data.held_out is not None, "data.held_out", "be given to calibrate", "none"
            )
            threshold = self.model.routing != "direct"
            _require(
                threshold, "model.routing", "have a threshold to calibrate", self.model.routing
            )

    def _check_order(self) -> None:
        _require(bool(self.stages), "stage", "be given at least once", "none")
        names = [stage.name for stage in self.stages]
        _require(names.count("clone") <= 1, "stage", "have clone once at most", names)
        cloned = False
        for name in names:
            early = name in BEFORE_CLONE
            wanted = "come before clone" if early else "come after clone"
            if name != "clone":
                _require(early != cloned, f"stage {name}", wanted, names)
            cloned = cloned or name == "clone"

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a TOML file; the paths in it are relative to it.

        Raises:
            ValueError: the file is missing or no TOML, a key is unknown or missing, or a value is of the wrong type
                or out of range; the message names it.
        """
        path = Path(path)
        try:
            table = _toml().loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"train: config must be a TOML file, got {path}: {reason}") from None
        return cls.from_dict(table, path.parent)

    @classmethod
    def from_dict(cls, table: dict[str, Any], base: Path | str = ".") -> Recipe:
        """Make a recipe of what a TOML file holds; paths are relative to ``base``."""
        return _parse(cls, table, "", Path(base).resolve())

    def to_dict(self) -> dict[str, Any]:
        """Plain values by dotted key, to compare recipes and to save them."""
        return dict(_flat(dataclasses.asdict(self)))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The dotted keys in which two recipes differ in what they train."""
    keys = sorted(old.keys() | new.keys())
    return [k for k in keys if k not in FREE_KEYS and old.get(k) != new.get(k)]


def _flat(value: Any, where: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{where}[{i}]")
    else:
        yield where, str(value) if isinstance(value, Path) else value


def _parse(cls: type, table: dict[str, Any], where: str, base: Path) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"train: {where.rstrip('.')} must be a table, got {table!r}")
    hints = typing.get_type_hints(cls)
    known = {f.metadata.get("key", f.name): f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"train: {where}{key} must be a known key, perhaps {where}{near}, got {key}"
            )
    for key, entry in known.items():
        unset = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if unset and key not in table:
            raise ValueError(f"train: {where}{key} must be given, got none")
    values = {
        known[k].name: _value(hints[known[k].name], v, where + k, base) for k, v in table.items()
    }
    return cls(**values)


def _value(hint: Any, value: Any, where: str, base: Path) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _parse(hint, value, f"{where}.", base)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"train: {where} must be a list, got {value!r}")
        return [_value(typing.get_args(hint)[0], item, where, base) for item in value]
    if hint is Path and isinstance(value, str | Path):
        return base / Path(value).expanduser()
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        wanted = {int: "whole number", float: "number", Path: "path"}.get(hint, "string")
        raise ValueError(f"train: {where} must be a {wanted}, got {value!r}")
    return value


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, f"be one of {', '.join(choices)}", value)


def _require(holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"train: {name} must {condition}, got {got}")
