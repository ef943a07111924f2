"""What the methods cost: parameters, FLOPs, and measured time against separate encoders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixpert_kernels.hf.tower import FusedMixpertTower

from .data import DOMAINS, EXPERTS, as_input, join, load
from .jobs import load_experts, load_joint
from .model import (
    encoder_flops,
    layer_parameters,
    parameters,
    projector_parameters,
    recut,
    router_flops,
)
from .settings import Settings

BATCHES = (8, 48, 240)
SINGLE, ROUTED, APART = "one encoder", "routed tower", "separate encoders"


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """Count parameters and FLOPs, and time a mixed batch, one thread, interleaved; medians.

    Separate encoders are told the domain of each image; the routed tower finds it out. All run the same code.

    Args:
        folder: of a run whose joint stage is done.
        settings: of the run.

    Returns:
        Parameters and FLOPs by method and by number of cloned layers, and seconds by batch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _times(folder, settings)
    finally:
        torch.set_num_threads(before)
    counts = _counts(folder, settings)
    return {
        "methods": counts,
        "depth": _by_depth(settings, counts[SINGLE]["parameters"]),
        "times": times,
    }


def _towers(folder: Path, settings: Settings) -> tuple[FusedMixpertTower, FusedMixpertTower]:
    one = recut(load_joint(settings, folder, 0), settings.cloned)
    return one.tower.eval(), load_experts(settings, folder, 0).tower


def _counts(folder: Path, settings: Settings) -> dict[str, dict[str, int]]:
    one, routed = _towers(folder, settings)
    whole = parameters(one) - parameters(one.router)
    flops = encoder_flops(settings)
    return {
        SINGLE: {"parameters": whole, "flops": flops},
        ROUTED: {"parameters": parameters(routed), "flops": flops + router_flops(settings)},
        APART: {"parameters": len(DOMAINS) * whole, "flops": flops},
    }


def _by_depth(settings: Settings, whole: int) -> list[dict[str, Any]]:
    """Parameters and FLOPs that one expert a domain adds to the joint encoder, by number of cloned layers."""
    router = 2 * settings.hidden + (settings.hidden + 1) * len(EXPERTS)
    rows: list[dict[str, Any]] = []
    for cloned in settings.depths:
        segment = cloned * layer_parameters(settings) + projector_parameters(settings)
        added = len(DOMAINS) * segment + router
        rows.append({"cloned": str(cloned), "parameters": added, "flops": router_flops(settings)})
    rows.append({"cloned": "all", "parameters": len(DOMAINS) * whole, "flops": 0})
    return rows


@torch.inference_mode()
def _times(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    one, routed = _towers(folder, settings)
    apart = [recut(load_joint(settings, folder, 0), settings.cloned).tower.eval() for _ in DOMAINS]
    tests = [load(folder, settings.part(domain, "test"), 0) for domain in DOMAINS]
    found = []
    for batch in tqdm(BATCHES, desc="timing", leave=False, disable=None):
        share = batch // len(DOMAINS) + 1
        images = join([images.select(slice(share)) for images in tests])
        images = images.select(torch.randperm(len(images.labels))[:batch])
        pixels, domain = as_input(images.pixels), images.domain

        def separate(pixels=pixels, domain=domain) -> torch.Tensor:
            y = pixels.new_empty(len(pixels), settings.tokens, settings.projector)
            for i, tower in enumerate(apart):
                own = (domain == i + 1).nonzero()[:, 0]
                if len(own):
                    y[own] = tower(pixels[own], output_router=False).last_hidden_state
            return y

        ways = {
            SINGLE: lambda pixels=pixels: one(pixels, output_router=False),
            ROUTED: lambda pixels=pixels: routed(pixels),
            APART: separate,
        }
        medians = _medians(ways, settings.rounds, calls=max(1, 120 // batch))
        found.append({"batch": batch, "seconds": medians})
    return found


def _medians(ways: dict[str, Callable], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of a call of each way, ``rounds`` of ``calls``, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}
