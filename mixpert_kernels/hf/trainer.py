"""transformers' Trainer for stage ``experts``: every expert by its own optimizer, clipping and schedule."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, get_scheduler

from mixpert_kernels.training import ExpertOptimizer, stage_of


class MixpertTrainer(Trainer):
    """transformers' Trainer over a model with a FusedMixpertTower inside, after ``set_stage``.

    In stage ``experts`` it makes an ``ExpertOptimizer`` of the optimizer that the arguments name, an expert each:
    ``max_grad_norm`` clips each expert's own gradient and Trainer's clipping is off; ``lr_scheduler_type`` and its
    warm-up run on each expert's own number of steps, out of the run's; ``weight_decay`` is for matrices, vectors have
    none. The logged learning rate is the largest of the experts'. Experts that no batch hits do not move. The model's
    loss must not mix experts: see ``per_expert_mean``. In any other stage it is the plain Trainer.

    The arguments are Trainer's; ``args`` is copied. One process or DDP: Trainer's FSDP shards experts apart and
    DeepSpeed steps them together, so both are refused in stage ``experts``.

    Raises:
        ValueError: in ``train``, in stage ``experts``: FSDP or DeepSpeed, an optimizer that needs the model, or a
            schedule that is no function of the step.
    """

    def __init__(self, model: nn.Module | None = None, args: Any = None, **options: Any) -> None:
        super().__init__(model, copy.copy(args), **options)
        self._max_norm = self.args.max_grad_norm
        self._schedule = _constant
        self.add_callback(_ForgetHits())

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer: an ExpertOptimizer in stage ``experts``."""
        trained = self.model if model is None else model
        if self.optimizer is not None or stage_of(trained) != "experts":
            return super().create_optimizer(*([] if model is None else [model]))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = "fsdp" if self.is_fsdp_enabled else "deepspeed"
            raise ValueError(
                f"MixpertTrainer: {name} must be off in stage experts, got it on: use DDP, or fully_shard with "
                "shard_placement and an ExpertOptimizer in a loop of your own"
            )
        kind, options = self._optimizer_kind(trained)
        decay = self.args.weight_decay

        def make(tensors: list[Tensor]) -> Optimizer:
            matrices = [t for t in tensors if t.ndim >= 2]
            vectors = [t for t in tensors if t.ndim < 2]
            groups = [(matrices, decay), (vectors, 0.0)]
            return kind([{"params": ts, "weight_decay": d} for ts, d in groups if ts], **options)

        self.args.max_grad_norm = 0.0  # Trainer's own clipping, over all experts
        self.optimizer = ExpertOptimizer(
            trained,
            make,
            max_norm=self._max_norm or None,
            schedule=lambda step: self._schedule(step),
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Make the schedule: in stage ``experts`` a function that each expert reads at its own count."""
        ours = _inner(self.optimizer if optimizer is None else optimizer)
        if self.lr_scheduler is not None or not isinstance(ours, ExpertOptimizer):
            return super().create_scheduler(num_training_steps, optimizer)
        like = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=like,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                "MixpertTrainer: lr_scheduler_type must be a function of the step in stage experts, got "
                f"{self.args.lr_scheduler_type}"
            )
        self._schedule = scheduler.lr_lambdas[0]
        self.lr_scheduler = _OwnCounts(ours)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _optimizer_kind(self, model: nn.Module) -> tuple[type[Optimizer], dict[str, Any]]:
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        whole_model = {"params", "model", "optimizer_dict"} & options.keys()
        if whole_model or not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise ValueError(
                "MixpertTrainer: optim must name an optimizer of a list of tensors in stage experts, got "
                f"{self.args.optim}"
            )
        return kind, options


class _OwnCounts(LRScheduler):
    """Stands where Trainer expects a schedule: the experts follow their own counts, this reports their rate."""

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        return [max(self.optimizer.last_rates.values(), default=0.0)]


class _ForgetHits(TrainerCallback):
    """A step that the gradient scaler skipped must not leave its hits to the next: Trainer zeroes the model alone."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any):
        if isinstance(_inner(optimizer), ExpertOptimizer):
            optimizer.zero_grad()


def _inner(optimizer: Any) -> Any:
    """The optimizer that accelerate's wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _constant(step: int) -> float:
    return 1.0
