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
    DOMAINS,
    Sample,
    evaluation_set,
    fingerprint,
    folder_set,
    training_set,
)
from mixpert_kernels.demo.model import (
    DemoModel,
    build_model,
    expert_of,
    pixels_of,
    train_router,
)
from mixpert_kernels.demo.results import Routed, accuracy, domain_table, mistakes, verdict
from mixpert_kernels.demo.saved import SavedModel, has_experts, load_saved
from mixpert_kernels.demo.timing import Timing, time_variants
from mixpert_kernels.ops import Strategy

EXPERTS = 4
FORWARD_BATCH = 64  # a forward takes the whole evaluation set; larger folders take several
HEAVY_BATCH = 4


class DemoOptions(NamedTuple):
    """What `mixpert demo` was asked for."""

    geometry: str = "tiny"
    model: Path | None = None
    images: Path | None = None
    out: Path = Path("mixpert-demo.png")
    experts: int | None = None  # 4; a model that has experts has its own number
    seed: int = 0
    images_per_domain: int | None = None  # to train on; None: as many as the model can afford


class DemoResult(NamedTuple):
    """What came out; ``accuracy`` is None where nobody knows which experts are right, ``timings`` may be empty."""

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
    model: DemoModel | SavedModel
    if options.model is not None and has_experts(options.model):
        model = load_saved(options.model)
        print(f"model     {model.title}\n          {model.sizes}")
        print("router    the model's own, as it is: random where it was never trained")
        router = "The model's own router"
    else:
        experts = EXPERTS if options.experts is None else options.experts
        model = build_model(options.geometry, options.model, experts, options.seed)
        print(f"tower     {model.title}, seed {options.seed}\n          {model.sizes}")
        print("          the experts are untrained clones, all alike: only the routing is at stake")
        training = _train(model, samples, options)
        router = f"Linear router trained on {training} other images (seed {options.seed})"
    routed = route_samples(model, samples)
    _print_routes(samples, routed, model.names)
    timings = []
    if isinstance(
        model, DemoModel
    ):  # trained experts differ, and then so do the variants to compare
        timings = _time(model, samples)
        _print_timings(timings, model, min(len(samples), _timed_images(model)))
    draw_figure(
        options.out,
        samples,
        routed,
        model.names,
        _headline(samples, routed),
        _notes(model, router, routed, options.images is None),
    )
    print(f"\npicture   {options.out}\ntotal     {time.perf_counter() - start:.1f} s")
    return DemoResult(samples, routed, accuracy(routed), timings)


def _check(options: DemoOptions) -> None:
    out = options.out
    if options.experts is not None and not 1 <= options.experts <= 8:
        raise ValueError(f"demo: experts must lie in 1..8, got {options.experts}")
    if options.model is not None and options.experts is not None and has_experts(options.model):
        raise ValueError(
            f"demo: experts must not be given for {options.model}, which has its own, got {options.experts}"
        )
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
def route_samples(model: DemoModel | SavedModel, samples: Sequence[Sample]) -> list[Routed]:
    """Route the mixed batch, in one forward where memory and patience allow."""
    trained_here = isinstance(model, DemoModel)
    batch = FORWARD_BATCH if trained_here and not model.heavy else HEAVY_BATCH
    routed = []
    starts = range(0, len(samples), batch)
    for i in tqdm(
        starts, desc="routing", unit="batch", leave=False, delay=1, disable=len(starts) < 2
    ):
        part = samples[i : i + batch]
        if isinstance(model, SavedModel):
            routes = model.route([sample.image for sample in part])
        else:
            out = model.tower(pixels_of(model, part))
            routes = zip(out.expert.tolist(), map(tuple, out.router_scores.tolist()), strict=True)
        for sample, (expert, scores) in zip(part, routes, strict=True):
            known = sample.domain is not None and (trained_here or sample.domain in model.names)
            wanted = expert_of(sample.domain or "", model.names) if known else -1
            routed.append(Routed(expert, wanted, scores))
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
    right, known = verdict(routed)
    print()
    if not known:
        rows = [["image", "expert", *names]]
        rows += [
            [s.name, names[r.expert], *(f"{score:.2f}" for score in r.scores)]
            for s, r in zip(samples, routed, strict=True)
        ]
        print_table(rows)
        return
    print_table(domain_table(samples, routed, names))
    print(f"\nrouting accuracy {right / known:.1%} ({right} of {known} images)")
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
    right, known = verdict(routed)
    if not known:
        return f"Mixpert: {len(samples)} images, each routed to one expert"
    return f"Mixpert: {right} of {known} images went to their domain's expert ({right / known:.1%})"


def _notes(
    model: DemoModel | SavedModel, router: str, routed: Sequence[Routed], ours: bool
) -> list[str]:
    notes = [
        f"{model.title}; {model.sizes}.",
        f"{router}; bars: its scores. {_rule(model.settings.strategy, model.names[0])}",
    ]
    if any(result.correct is not None for result in routed):
        clones = "; the experts are untrained clones" if isinstance(model, DemoModel) else ""
        notes.append(f"Red: did not go to its domain's expert{clones}.")
    elif ours:
        notes.append(f"No expert is called {', '.join(DOMAINS[:-1])} or {DOMAINS[-1]}.")
    if len(routed) > LARGEST:
        notes.append(f"The first {LARGEST} images are shown.")
    return notes


def _rule(strategy: Strategy, versatile: str) -> str:
    """When the first expert takes an image although another scored best."""
    if strategy.name == "direct":
        return "The best score decides."
    if strategy.name == "score_threshold":
        return f"Where the best is below {strategy.tau:g}, {versatile} takes it."
    pair = "the two best" if strategy.against == "runner_up" else f"the best and {versatile}'s"
    return f"Where {pair} differ by less than {strategy.delta:g}, {versatile} takes it."
