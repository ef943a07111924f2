"""A line of log for each routed image of a ``generate``, for programs that hide the model: ``transformers serve``."""

from __future__ import annotations

import logging

from transformers.utils.logging import get_logger

from mixpert_kernels.hf.expert_names import names_of

from .scope import Record
from .settings import Settings

logger = get_logger("transformers.mixpert")  # transformers' own level, handler and --log-level


def routes(records: list[Record], settings: Settings) -> None:
    """Log expert and score of each image, or video. Waits for the device, and so does nothing above level info."""
    if not logger.isEnabledFor(logging.INFO):
        return
    names = names_of(settings)
    for record in records:
        for expert, scores in zip(record.expert.tolist(), record.scores.tolist(), strict=True):
            logger.info(f"mixpert {record.modality} to {names[expert]} ({scores[expert]:.2f})")
