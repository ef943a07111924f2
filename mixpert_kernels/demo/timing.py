"""How long a mixed batch takes, next to what one would do without routed kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mixpert_kernels import FusedMixpertTower, Routing
from mixpert_kernels.hf.families import family_of

ROUTED = "routed: each image through its own expert"
TOLERANCE = 1e-4  # of the largest output: float32 sums in another order


class Timing(NamedTuple):
    """One way to run the batch: its median, in seconds."""

    name: str
    seconds: float


@torch.inference_mode()
def time_variants(tower: FusedMixpertTower, pixels: Tensor, repeats: int = 3) -> list[Timing]:
    """Time the routed tower against its alternatives, interleaved, after checking that their results agree.

    Args:
        tower: in eval mode, its experts still clones, so that all ways give the same.
        pixels: (B, C, H, W), one image a tile.
        repeats: how often each way runs; the median counts.

    Returns:
        The routed tower first.

    Raises:
        RuntimeError: an alternative computes something else.
    """
    variants = _variants(tower, pixels)
    want = variants[ROUTED]()
    for name, run in tqdm(variants.items(), desc="checking", leave=False, delay=1):
        got = run()  # also the warm-up
        if not _agree(got, want):
            raise RuntimeError(f"time_variants: {name} must give what the routed tower gives")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(repeats), desc="timing", unit="round", leave=False, delay=1):
        for name, run in variants.items():
            seconds[name].append(_seconds(run, pixels.device))
    return [Timing(name, statistics.median(times)) for name, times in seconds.items()]


def _variants(tower: FusedMixpertTower, pixels: Tensor) -> dict[str, Callable[[], Tensor]]:
    num_experts = tower.config.num_experts
    vision, projector = tower.export_expert(0)
    vision.eval()
    one = FusedMixpertTower.from_vision_model(
        vision, projector, num_experts=1, expert_layers=tower.config.expert_layers
    ).eval()

    def routed() -> Tensor:
        return tower(pixels).last_hidden_state

    def single() -> Tensor:
        return one(pixels).last_hidden_state

    def loop() -> Tensor:
        x, args, kwargs = tower._run_trunk(pixels, False)
        expert = tower.route(x).expert
        parts = {}
        for k in expert.unique().tolist():
            rows = (expert == k).nonzero()[:, 0]
            forced = Routing.forced(torch.full_like(rows, k), num_experts)
            parts[k] = rows, tower.expert_segment(x[rows], forced, *args, **kwargs)
        y = x.new_empty(len(x), *next(iter(parts.values()))[1].shape[1:])
        for rows, part in parts.values():
            y[rows] = part
        return y

    def all_experts() -> Tensor:
        x, args, kwargs = tower._run_trunk(pixels, False)
        expert = tower.route(x).expert.long()
        forced = [
            Routing.forced(torch.full_like(expert, k), num_experts) for k in range(num_experts)
        ]
        every = [tower.expert_segment(x, routing, *args, **kwargs) for routing in forced]
        return torch.stack(every)[expert, torch.arange(len(expert), device=expert.device)]

    feature: list[Tensor] = []
    *_, last_block = vision.get_submodule(family_of(vision).blocks).children()
    last_block.register_forward_hook(lambda _module, _args, y: feature.append(y))

    def plain() -> Tensor:
        feature.clear()
        vision(pixel_values=pixels)
        x = feature[0][0] if isinstance(feature[0], tuple) else feature[0]
        return x if projector is None else projector(x)

    return {
        ROUTED: routed,
        "the same model with one expert (dense)": single,
        "a Python loop over the experts": loop,
        "all experts run, one result kept": all_experts,
        "plain transformers model, one expert": plain,
    }


def _agree(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max())


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
