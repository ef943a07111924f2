"""What tests/test_distributed.py runs, in one process and, as a script, in each of two.

python tests/_distributed.py RANK STORE FOLDER     results go to FOLDER/CASE-RANK.pt
"""

from __future__ import annotations

import datetime
import functools
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from _towers import KINDS, make, pixels
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixpert_kernels.training import (
    ExpertOptimizer,
    find_tower,
    per_expert_mean,
    set_stage,
    shard_placement,
)

EXPERTS, PROCESSES, SIZE = 4, 2, KINDS["siglip"].size
# The experts of each process's images, step by step. Nobody ever hits expert 3; some have no image at all.
STEPS = (
    ([0, 1], [1, 2, 2]),
    ([0], []),
    ([], [2, 1]),
    ([2, 2, 2], [0]),
    ([1, 0], [1]),
)
CASES = [
    f"{stage}-{how}"
    for stage in ("experts", "experts_head", "joint")
    for how in ("ddp", "fsdp", "resumed")
]
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
CLIP = 0.05  # below every gradient's norm here


class Classifier(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.tower = make("siglip", num_experts=num_experts)
        torch.manual_seed(0)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor, expert: Tensor) -> Tensor:
        return self.head(self.tower(images, expert=expert).last_hidden_state.mean(1))


def build(stage: str, how: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Classifier(1 if stage == "joint" else EXPERTS).double().train()
    set_stage(model, stage.partition("_")[0])
    if stage == "experts_head":
        model.head.requires_grad_(True)
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how in ("fsdp", "resumed"):
        shard(model, shard_placement)
    trains = [p for p in model.parameters() if p.requires_grad]
    if stage == "joint":
        return model, ADAMW(trains)
    return model, ExpertOptimizer(model, ADAMW, max_norm=CLIP, schedule=lambda step: 0.9**step)


def shard(model: nn.Module, placement) -> None:
    """Some blocks as units of their own, all else in the model's: never the trunk, whose parts the tower calls."""
    first, *_ = model.tower.trunk.encoder.layers
    for unit in (first, *model.tower.experts, model.tower.projector, model):
        fully_shard(unit, shard_placement_fn=placement)


def data(step: int, ranks: range, stage: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, experts and labels of some processes at a step."""
    per_rank = [len(routes) for routes in STEPS[step]]
    images = pixels(sum(per_rank), SIZE, 70 + step).double().split(per_rank)
    labels = (torch.arange(sum(per_rank)) % 4).split(per_rank)
    routes = [torch.tensor(STEPS[step][r], dtype=torch.long) for r in ranks]
    expert = torch.cat(routes) * (stage != "joint")
    return torch.cat([images[r] for r in ranks]), expert, torch.cat([labels[r] for r in ranks])


def train_step(model: nn.Module, optimizer, step: int, ranks: range, stage: str) -> Tensor:
    images, expert, labels = data(step, ranks, stage)
    experts = find_tower(model).config.num_experts
    if len(images):
        losses = nn.functional.cross_entropy(model(images, expert), labels, reduction="none")
    else:  # a process without images takes part with one that counts for nothing
        dummy, route = torch.zeros(1, 3, *SIZE).double(), torch.zeros(1, dtype=torch.long)
        if stage == "joint":
            logits = model(dummy, route)
        else:
            with optimizer.no_hits():
                logits = model(dummy, route)
        losses = logits[:0].sum(1)
    loss = per_expert_mean(losses, expert, experts)
    loss.backward()
    if stage == "joint":
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def run_case(case: str, rank: int | None) -> dict:
    """Five steps; rank None is one process with everybody's images."""
    stage, _, how = case.partition("-")
    ranks = range(PROCESSES) if rank is None else range(rank, rank + 1)
    how = how if rank is not None else "one"
    model, optimizer = build(stage, how)
    losses = []
    for step in range(len(STEPS)):
        if how == "resumed" and step == 3:
            model, optimizer = resumed(model, optimizer, stage)
        losses.append(train_step(model, optimizer, step, ranks, stage))
    found = {
        "weights": {plain(n): full(p.detach()) for n, p in model.named_parameters()},
        "losses": losses,
        "norms": {} if stage == "joint" else optimizer.last_norms,
    }
    if stage != "joint":
        found["steps"] = optimizer.steps
        found["optimizer"] = optimizer.state_dict()
    return found


def resumed(model: nn.Module, optimizer, stage: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A new model and optimizer, from whole tensors."""
    weights = {plain(n): full(p.detach()) for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    new, other = build(stage, "one")
    new.load_state_dict(weights)
    shard(new, shard_placement)
    trains = [p for p in new.parameters() if p.requires_grad]
    if stage == "joint":  # torch's own state is sharded as the parameters are
        other = ADAMW(trains)
    else:
        other = ExpertOptimizer(new, ADAMW, max_norm=CLIP, schedule=lambda step: 0.9**step)
    other.load_state_dict(state)
    return new, other


def plain(name: str) -> str:
    return name.removeprefix("module.")


def full(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def apart() -> str:
    """What the optimizer says of a model sharded along its experts."""
    model = Classifier(EXPERTS)
    set_stage(model, "experts")
    shard(model, None)
    try:
        ExpertOptimizer(model, ADAMW)
    except ValueError as error:
        return str(error)
    return "no error"


def cloned() -> str:
    """What set_stage says of a sharded model to clone."""
    model = Classifier(1)
    set_stage(model, "joint")
    shard(model, shard_placement)
    try:
        set_stage(model, "clone", num_experts=2)
    except ValueError as error:
        return str(error)
    return "no error"


def main(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(minutes=10),
    )
    for name in (*CASES, "apart", "cloned"):
        try:
            call = {"apart": apart, "cloned": cloned}.get(name, lambda n=name: run_case(n, rank))
            result = call()
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")
        if isinstance(result, str) and name in CASES:
            break  # the other process may hang in this case: its time limit ends it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
