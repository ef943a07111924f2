"""ExpertOptimizer: every expert trains in one mixed batch as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._hits import watch
from ._parted import Make, PartedOptimizer, trainable_apart
from ._sharded import check_sharding, shard_placement
from .stages import find_tower, grouped_parameters

__all__ = ["ExpertOptimizer", "shard_placement"]


class ExpertOptimizer(PartedOptimizer):
    """Steps each expert by an optimizer of its own, and only when it had images.

    A grouped parameter p (E, ...) holds all experts. A stock optimizer over it would decay the weights of experts
    without images, move them by old momentum, count their steps and clip by the norm over all of them. Here expert e
    is the parameters p[e]: one inner optimizer, step count, clip norm and schedule an expert, so that each trains bit
    for bit as it would alone on its own images, given a loss that does not mix experts (``per_expert_mean``). All
    other trainable parameters belong to one more, "shared", which steps whenever it has gradients.

    An expert is hit by a batch when backward reaches the features of an image it served; ``step`` moves the experts
    hit since the last ``step`` or ``zero_grad``, in a process group those hit in any process. Images that must not
    count, such as the dummy of a process without any, are run under ``no_hits()``. In a compiled model it is forward
    that hits, so call ``zero_grad`` before it; make the optimizer before the model first runs compiled, for what was
    traced without its hook never calls it. Where no hook can see a batch ``hit(expert)`` says what it held; ``step``
    raises where there are gradients and nothing was hit.

    DDP: wrap the model as usual. FSDP2: first ``fully_shard(..., shard_placement_fn=shard_placement)``, then make the
    optimizer; an expert is a row of dimension 0, which must stay whole.

    Args:
        model: what ``set_stage`` was called on; its trainable parameters of now are those that train.
        make: makes an inner optimizer of a list of tensors, each a parameter of one expert, in the model's order;
            it may put them in several groups. ``functools.partial(torch.optim.AdamW, lr=4e-6)``.
        max_norm: clip the gradient of each expert, and of the shared parameters, to this norm; None for no clipping.
        schedule: factor on the learning rate by the number of steps this expert made before, from 0.

    Raises:
        ValueError: no trainable parameters, no or two towers, ``max_norm`` not positive, or a model sharded along its
            experts.
        RuntimeError: in ``step``: experts have gradients, none was hit, and nothing ran under ``no_hits()``.

    Cost:
        One copy of E numbers from the device a step, the only wait (and one all-reduce of them in a process group).
        Launches: those of the hit experts' inner optimizers, one after the other. Memory: their states, which an
        expert has from its first step on.

    Example:
        >>> import functools
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> from mixpert_kernels import FusedMixpertTower
        >>> from mixpert_kernels.training import per_expert_mean, set_stage
        >>> vision = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14))
        >>> tower = FusedMixpertTower.from_vision_model(vision, nn.Linear(32, 8), num_experts=3)
        >>> rows = set_stage(tower, "experts")  # doctest: +ELLIPSIS
        stage experts...
        >>> optimizer = ExpertOptimizer(tower, functools.partial(torch.optim.AdamW, lr=4e-6), max_norm=1.0)
        >>> images, expert = torch.randn(4, 3, 28, 28), torch.tensor([2, 0, 2, 2])
        >>> y = tower(images, expert=expert).last_hidden_state
        >>> per_expert_mean(y.square().mean((1, 2)), expert, num_experts=3).backward()
        >>> optimizer.step()
        >>> optimizer.steps
        [1, 0, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        *,
        max_norm: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        tower = find_tower(model)
        sets, shared = trainable_apart(model, [grouped_parameters(tower)])
        check_sharding(sets[0])
        super().__init__(sets, tower.config.num_experts, shared, make, max_norm, schedule)
        self._given_names = tower.config.expert_names
        self._hits = torch.zeros(self.num_experts, dtype=torch.uint8)
        self.counting = True  # read by the hook
        self._silenced = False
        watch(tower, self)

    @torch.no_grad()
    def hit(self, expert: Tensor | int) -> None:
        """Count experts, ids of any shape, as hit by the batch of the next ``step``."""
        expert = torch.as_tensor(expert).flatten()
        if self._hits.device != expert.device:
            self._hits = self._hits.to(expert.device)
        self._hits.index_fill_(0, expert.long(), 1)

    @contextlib.contextmanager
    def no_hits(self) -> Iterator[None]:
        """Run the model on images that hit no expert; backward may come later."""
        before, self.counting = self.counting, False
        self._silenced = True
        try:
            yield
        finally:
            self.counting = before

    def _hit_experts(self) -> list[list[int]]:
        if not self._sets:
            return []
        parameters = self.param_groups[0]["params"]
        if dist.is_available() and dist.is_initialized():
            self._hits = self._hits.to(parameters[0].device)
            dist.all_reduce(self._hits, op=dist.ReduceOp.MAX)
        hits = self._hits.tolist()
        if not (any(hits) or self._silenced or all(p.grad is None for p in parameters)):
            raise RuntimeError(
                "ExpertOptimizer.step: some expert must have been hit since the last step, got gradients and no hit: "
                "make the optimizer before the batch's forward (and the first compiled one), or call hit(expert)"
            )
        return [hits]

    def _expert_names(self) -> list[str]:
        return self._given_names or [f"expert_{e}" for e in range(self.num_experts)]

    def _forget(self) -> None:
        self._hits.zero_()
        self._silenced = False
