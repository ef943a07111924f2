"""Rows of metrics, as JSON lines and for TensorBoard, without a gap or a double after a resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .batches import Skipped

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"


class Metrics:
    """Appends rows to ``metrics.jsonl`` and, where it is installed, to TensorBoard.

    Args:
        output: the run's directory.
        stage: index of the stage that the run goes on with.
        step: how many of its steps are done. Rows of later ones are dropped: they will be written again.
        total: steps done over all stages.
    """

    def __init__(self, output: Path, stage: int = 0, step: int = 0, total: int = 0) -> None:
        self.path = output / METRICS
        _cut(self.path, lambda row: (row["stage_index"], row["step"]) <= (stage, step))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if find_spec("tensorboard") is None:
            print(
                'tensorboard is not installed, so metrics go to metrics.jsonl alone: pip install -e ".[train]"'
            )
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=total + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row: ``stage_index``, ``step`` and ``total_step`` place it; not a number becomes null."""
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _numbers(row):
                self._board.add_scalar(f"{row['stage']}/{key}", value, row["total_step"])

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class SkipList:
    """``skipped.jsonl``: each image that could not be read, once.

    Args:
        output: the run's directory; None for a process that does not write.
    """

    def __init__(self, output: Path | None) -> None:
        self.path = None if output is None else output / SKIPPED
        self.seen: set[str] = set()
        if self.path is not None:
            self.seen = {row["path"] for row in _cut(self.path, lambda row: True)}

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Write and print those that are new."""
        for image in skipped:
            if self.path is None or image.path in self.seen:
                continue
            self.seen.add(image.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(image._asdict()) + "\n")
            print(f"skipped   {image.path}: {image.reason}")


class Clock:
    """Images by second since it was last asked."""

    def __init__(self) -> None:
        self.images, self.start = 0, time.perf_counter()

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self.images / max(now - self.start, 1e-9)
        self.images, self.start = 0, now
        return rate


def _cut(path: Path, keep: Any) -> list[dict[str, Any]]:
    """Cut a file of JSON lines before the first that is torn or that ``keep`` refuses; return the rows before it."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None or not keep(row):
                break
            rows.append(row)
            end += len(line)
    os.truncate(path, end)
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _numbers(row: dict[str, Any], where: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{where}{key}/")
        elif isinstance(value, int | float) and key not in ("stage_index", "step", "total_step"):
            found.append((f"{where}{key}", float(value)))
    return found
