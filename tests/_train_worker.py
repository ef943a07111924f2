"""One process of a distributed run: trains each recipe of a JSON file in turn, in one process group.

Usage: torchrun --nproc-per-node 2 _train_worker.py RECIPES.json
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mixpert_kernels.training import Recipe, run, train


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))  # ends what hangs
    step = run.run_step
    counts: list[int] = []
    sharded: list[bool] = []

    def counting(model, runner, optimizer, batch, *rest):
        counts.append(len(batch.samples))
        sharded.append(all(isinstance(p, DTensor) for p in model.parameters()))
        return step(model, runner, optimizer, batch, *rest)

    run.run_step = counting
    for made in json.loads(Path(sys.argv[1]).read_text()):
        counts.clear()
        sharded.clear()
        stop = made.pop("stop", None)
        settings = Recipe.from_dict(made)
        try:
            with _Stopping(stop):
                train(settings, progress=False)
        except KeyboardInterrupt:
            assert stop is not None
        dist.barrier()
        (settings.output / f"counts{dist.get_rank()}.json").write_text(
            json.dumps({"images": counts, "sharded": sharded})
        )
    dist.barrier()
    dist.destroy_process_group()


class _Stopping:
    """Has the step numbered ``calls`` raise KeyboardInterrupt, in every process alike."""

    def __init__(self, calls: int | None) -> None:
        self.calls, self.step = calls, run.run_step

    def __enter__(self) -> None:
        done = iter(range(10**9 if self.calls is None else self.calls))

        def stopping(*args):
            if next(done, None) is None:
                raise KeyboardInterrupt
            return self.step(*args)

        run.run_step = stopping

    def __exit__(self, *error: object) -> None:
        run.run_step = self.step


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
