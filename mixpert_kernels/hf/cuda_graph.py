"""CUDA graphs: a function recorded once and replayed on the same memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 2  # compile, load and allocate what a capture must not


class Recorder(Protocol):
    """Records a function and replays it on the same memory."""

    def record(self, run: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Return the outputs of ``run`` and what computes them anew, in place."""

    def turn(self) -> contextlib.AbstractContextManager:
        """The extent of one call; the next one, from any thread or stream, comes after it."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: at most one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    def record(self, run: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile (pin memory, load data) does not break the capture.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                outputs = run()
            torch.cuda.current_stream().wait_stream(self._stream)
        return outputs, graph.replay

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()
