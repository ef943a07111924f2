"""The loss under teacher routing: each expert's mean over its own samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def per_expert_mean(
    losses: Tensor,  # (I,)
    expert: Tensor,  # (I,)
    num_experts: int,
    *,
    counts: Tensor | None = None,  # (I,)
) -> Tensor:  # ()
    """Add up the experts' mean losses, each over the expert's own samples (or tokens).

    ``sum_e (sum_{i of e} losses_i) / (sum_{i of e} counts_i)``: an expert's gradient is that of a batch of its own
    samples alone, whatever else is in the batch. A plain mean would scale it by the expert's share of the batch.

    In a process group the counts are summed over the processes and the result is multiplied by their number: the mean
    over processes that DDP and FSDP take of gradients is then the gradient of one process with the whole batch. All
    processes must call this. One without samples of its own runs the model on a dummy image and passes what is left of
    its losses after slicing them away, so that every process takes part in backward:

        with optimizer.no_hits():  # the dummy is no image of expert 0
            y = model(dummy, expert=expert)  # one image
        loss = per_expert_mean(y[:0].square().mean((1, 2)), expert[:0], num_experts)

    Args:
        losses: (I,) floating point, each sample's loss, summed over its tokens where ``counts`` is given. I may be 0,
            and the result then is 0 with a graph where ``losses`` has one.
        expert: (I,) integers, 0 <= expert < E, the teacher's route of each sample.
        num_experts: E.
        counts: (I,) each sample's tokens (or weight), not negative; 1 for each if None. A sample of count 0 should
            have loss 0.

    Returns:
        Scalar, float32 (float64 for float64). An expert without samples adds exactly 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype or, where reading them is free (on a CPU), values.

    Cost:
        In a process group one all-reduce of E numbers. It does not wait for the device.

    Example:
        >>> losses, expert = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([2, 2, 0])
        >>> per_expert_mean(losses, expert, num_experts=3)  # (1 + 3) / 2 + 10
        tensor(12.)
    """
    _check(losses, expert, num_experts, counts)
    wide = losses if losses.dtype == torch.float64 else losses.float()
    expert = expert.to(losses.device, torch.int64, non_blocking=True)
    weights = torch.ones_like(expert) if counts is None else counts.to(losses.device)
    whole = not weights.is_floating_point()
    weights = weights.to(torch.int64 if whole else torch.float64)
    totals = weights.new_zeros(num_experts).index_add(0, expert, weights)  # (E,)
    sums = wide.new_zeros(num_experts).index_add(0, expert, wide)  # (E,)
    processes = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
        processes = dist.get_world_size()
    totals = torch.where(totals > 0, totals, 1).to(sums.dtype)
    return (sums / totals).sum() * processes


def _check(losses: Tensor, expert: Tensor, num_experts: int, counts: Tensor | None) -> None:
    if losses.ndim != 1 or not losses.is_floating_point():
        raise ValueError(
            f"per_expert_mean: losses must be floating point of shape (I,), got {losses.dtype} of shape "
            f"{tuple(losses.shape)}"
        )
    integers = not (expert.is_floating_point() or expert.is_complex() or expert.dtype == torch.bool)
    if expert.shape != losses.shape or not integers:
        raise ValueError(
            f"per_expert_mean: expert must be {len(losses)} integers, got {expert.dtype} of shape {tuple(expert.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"per_expert_mean: num_experts must be at least 1, got {num_experts}")
    if counts is not None and counts.shape != losses.shape:
        raise ValueError(
            f"per_expert_mean: counts must have shape {tuple(losses.shape)}, got {tuple(counts.shape)}"
        )
    if expert.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = expert[(expert < 0) | (expert >= num_experts)]
        if len(wrong):
            raise ValueError(
                f"per_expert_mean: expert must lie in 0..{num_experts - 1}, got {int(wrong[0])}"
            )
    if counts is None or counts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool((counts >= 0).all()):
        raise ValueError(f"per_expert_mean: counts must not be negative, got {float(counts.min())}")
