"""The share of images that each expert gets, in training and in inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mixpert_kernels.hf.expert_names import names_of

from .mixpertize import owner_of
from .scope import Record, recording

if TYPE_CHECKING:  # it needs accelerate
    from transformers import Trainer

MODALITIES = {"image": "", "video": "video/"}


class ExpertShares:
    """Counts the images and videos that each expert of a mixpertized model gets.

    Counting is a few small kernels a call of the vision tower and does not wait for the device; ``read`` does.
    """

    def __init__(self, model: nn.Module) -> None:
        owner = owner_of("ExpertShares", model)
        self.names = names_of(owner.mixpert_settings)
        self._entry = (owner, self)
        self._counts: dict[str, Tensor] = {}  # by modality, (E,) int64

    def start(self) -> None:
        """Count the model's calls in this thread, until ``stop``."""
        recording(self._entry, on=True)

    def stop(self) -> None:
        recording(self._entry, on=False)

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts.clear()

    def append(self, record: Record) -> None:
        """Count one call of the vision tower."""
        expert, images = record.routing.expert, record.images
        if images.base_tile is not None:
            expert = expert[images.base_tile]
        hits = expert[:, None] == torch.arange(len(self.names), device=expert.device)  # (I, E)
        if images.padded:  # how many images live, only the device knows
            image = torch.arange(len(hits), device=expert.device)
            hits = hits & (image <= images.image_of_tile[-1])[:, None]
        self._counts[record.modality] = hits.sum(0) + self._counts.get(record.modality, 0)

    def counts(self) -> Tensor:  # (2, E) int64
        """Return how many images, and how many videos, each expert got since the last ``reset``."""
        device = next((c.device for c in self._counts.values()), None)
        none = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        return torch.stack([self._counts.get(modality, none).to(none) for modality in MODALITIES])

    def read(self, counts: Tensor | None = None) -> dict[str, float]:
        """Return the shares, 0..1, as ``router/share/<expert>`` and ``router/share/video/<expert>``.

        A modality of which nothing was counted is left out. Waits for the device.

        Args:
            counts: (2, E), of more than this process; None for its own.
        """
        rows = (self.counts() if counts is None else counts).tolist()
        return {
            f"router/share/{where}{name}": count / sum(row)
            for where, row in zip(MODALITIES.values(), rows, strict=True)
            for name, count in zip(self.names, row, strict=True)
            if any(row)
        }


@contextlib.contextmanager
def expert_shares(model: nn.Module) -> Iterator[ExpertShares]:
    """Count, in this block and thread, the images that each expert of ``model`` gets.

    Raises:
        ValueError: the model has no experts.

    Example:
        >>> with expert_shares(model) as shares:  # doctest: +SKIP
        ...     for inputs in batches:
        ...         model.generate(**inputs)
        >>> shares.read()  # doctest: +SKIP
        {'router/share/photo': 0.75, 'router/share/chart': 0.25}
    """
    shares = ExpertShares(model)
    shares.start()
    try:
        yield shares
    finally:
        shares.stop()


class ExpertSharesCallback(TrainerCallback):
    """Logs, with every log of a Trainer's training, the share of images that each expert got since the last.

    The rows of ``trainer.log`` are ``router/share/<expert>`` and, for videos, ``router/share/video/<expert>``. All
    processes' images count: at a log, and then alone, they add up their counts, and the host waits. Evaluation does not
    count.

    Args:
        trainer: of a mixpertized model, or of one that holds one, such as PEFT's.

    Raises:
        ValueError: the model has no experts.

    Example:
        >>> trainer.add_callback(ExpertSharesCallback(trainer))  # doctest: +SKIP
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._shares = _InTraining(trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._shares.stop()  # a training that failed may have left it on
        self._shares = _InTraining(self._trainer.model)
        self._shares.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._shares.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not control.should_log:  # where it is set, Trainer has all processes meet
            return
        counts = self._trainer.accelerator.reduce(self._shares.counts().to(args.device), "sum")
        self._shares.reset()
        found = self._shares.read(counts)
        if found:
            self._trainer.log(found)
            control.should_log = True  # which log has cleared, and Trainer's own row is to come

    on_epoch_end = on_step_end


class _InTraining(ExpertShares):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model

    def append(self, record: Record) -> None:
        if self._model.training:
            super().append(record)
