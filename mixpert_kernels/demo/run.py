"""The demo from top to bottom: images, tower, router, one routed forward, times, the picture."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from mixpert_kernels.cli.tables import print_table
from mixpert_kernels.demo.figure import LARGEST, draw_figure
from mixpert_kernels.demo.images import (
    Sample,
    evaluation_set,
    fingerprint,
    folder_set,
    training_set,
)
from mixpert_kernels.demo.model import (
    DemoModel,
    build_model,
    describe,
    expert_of,
    pixels_of,
    train_router,
)
from mixpert_kernels.demo.results import Routed, accuracy, domain_table, mistakes
from mixpert_kernels.demo.timing import Timing, time_variants

FORWARD_BATCH = 64  # a forward takes the whole evaluation set; larger folders take several
HEAVY_BATCH = 4


class DemoOptions(NamedTuple):
    """What `mixpert demo` was asked for."""

    geometry: str = "tiny"
    model: Path | None = None
    images: Path | None = None
    out: Path = Path("mixpert-demo.png")
    experts: int = 4
    seed: int = 0
    images_per_domain: int | None = None  # to train on; None: as many as the model can afford


class DemoResult(NamedTuple):
    """What came out; ``accuracy`` is None where nobody knows the domains."""

    samples: list[Sample]
    routed: list[Routed]
    accuracy: float | None
    timings: list[Timing]


def run_demo(options: DemoOptions) -> DemoResult:
    """Run the demo, print what happens and write the picture.

    Raises:
        ValueError: an option cannot be served; said before any work.
    """
    start = time.perf_counter()
    _check(options)
    samples = folder_set(options.images) if options.images else evaluation_set(options.seed)
    model = build_model(options.geometry, options.model, options.experts, options.seed)
    print(f"tower     {model.title}, seed {options.seed}")
    print(f"          {describe(model)}")
    print("          the experts are untrained clones, all alike: only the routing is at stake")
    training = _train(model, samples, options)
    routed = route_samples(model, samples)
    names = model.tower.config.expert_names
    _print_routes(samples, routed, names)
    timings = _time(model, samples)
    _print_timings(timings, model, min(len(samples), _timed_images(model)))
    draw_figure(
        options.out,
        samples,
        routed,
        names,
        _headline(samples, routed),
        _notes(model, options, len(samples), training),
    )
    print(f"\npicture   {options.out}\ntotal     {time.perf_counter() - start:.1f} s")
    return DemoResult(samples, routed, accuracy(routed), timings)


def _check(options: DemoOptions) -> None:
    out = options.out
    if not 1 <= options.experts <= 8:
        raise ValueError(f"demo: experts must lie in 1..8, got {options.experts}")
    if options.seed < 0:
        raise ValueError(f"demo: seed must be at least 0, got {options.seed}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"demo: out must end in .png, got {out}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"demo: out must be a file in a directory that can be written, got {out}")


def _train(model: DemoModel, samples: Sequence[Sample], options: DemoOptions) -> int:
    """Train the router on images that share none with the evaluation set; returns how many."""
    count = options.images_per_domain or model.images_per_domain
    start = time.perf_counter()
    training = training_set(count, options.seed)
    seen = {fingerprint(sample.image) for sample in training}
    if any(fingerprint(sample.image) in seen for sample in samples):
        raise RuntimeError("demo: images to route must not be among the training images")
    score = train_router(model, training, options.seed)
    seconds = time.perf_counter() - start
    print(
        f"router    trained on {len(training)} other images in {seconds:.1f} s "
        f"({score:.1%} of them right), on frozen trunk features"
    )
    return len(training)


@torch.inference_mode()
def route_samples(model: DemoModel, samples: Sequence[Sample]) -> list[Routed]:
    """Route the mixed batch, in one forward where memory and patience allow."""
    names = model.tower.config.expert_names
    batch = HEAVY_BATCH if model.heavy else FORWARD_BATCH
    routed = []
    starts = range(0, len(samples), batch)
    for i in tqdm(
        starts, desc="routing", unit="batch", leave=False, delay=1, disable=len(starts) < 2
    ):
        part = samples[i : i + batch]
        out = model.tower(pixels_of(model, part))
        for sample, expert, scores in zip(
            part, out.expert.tolist(), out.router_scores.tolist(), strict=True
        ):
            wanted = -1 if sample.domain is None else expert_of(sample.domain, names)
            routed.append(Routed(expert, wanted, tuple(scores)))
    return routed


def _time(model: DemoModel, samples: Sequence[Sample]) -> list[Timing]:
    """Time a batch spread over the samples, so that it holds every domain."""
    count = min(len(samples), _timed_images(model))
    chosen = [samples[i * len(samples) // count] for i in range(count)]
    return time_variants(model.tower, pixels_of(model, chosen))


def _timed_images(model: DemoModel) -> int:
    return 2 if model.heavy else 8


def _print_routes(
    samples: Sequence[Sample], routed: Sequence[Routed], names: Sequence[str]
) -> None:
    score = accuracy(routed)
    print()
    if score is None:
        rows = [["image", "expert", *names]]
        rows += [
            [s.name, names[r.expert], *(f"{score:.2f}" for score in r.scores)]
            for s, r in zip(samples, routed, strict=True)
        ]
        print_table(rows)
        return
    print_table(domain_table(samples, routed, names))
    right = sum(bool(r.correct) for r in routed)
    print(f"\nrouting accuracy {score:.1%} ({right} of {len(routed)} images)")
    for line in mistakes(samples, routed, names):
        print(f"  wrong: {line}")


def _print_timings(timings: Sequence[Timing], model: DemoModel, batch: int) -> None:
    device = model.tower.device
    where = "GPU" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\na mixed batch of {batch} images, {where}: median of 3, interleaved")
    base = timings[0].seconds
    rows = [["", "ms", "to routed"]]
    rows += [[t.name, f"{t.seconds * 1e3:.1f}", f"{t.seconds / base:.2f}x"] for t in timings]
    print_table(rows)


def _headline(samples: Sequence[Sample], routed: Sequence[Routed]) -> str:
    score = accuracy(routed)
    if score is None:
        return f"Mixpert: {len(samples)} images, each routed to one expert"
    right = sum(bool(r.correct) for r in routed)
    return f"Mixpert: {right} of {len(routed)} images went to their domain's expert ({score:.1%})"


def _notes(model: DemoModel, options: DemoOptions, images: int, training: int) -> list[str]:
    notes = [
        f"{model.title}; {describe(model)}.",
        f"Linear router trained on {training} other images (seed {options.seed}); bars: its scores. "
        f"Where the two best differ by less than {model.tower.config.delta:g}, the versatile expert takes it.",
    ]
    if options.images is None:
        notes.append("Red: did not go to its domain's expert; the experts are untrained clones.")
    if images > LARGEST:
        notes.append(f"The first {LARGEST} images are shown.")
    return notes
