"""ExpertOptimizer: every expert trains in one mixed batch as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ._hits import watch
from ._part import Part
from ._sharded import check_sharding, shard_placement
from .stages import find_tower, grouped_parameters

__all__ = ["ExpertOptimizer", "shard_placement"]

Make = Callable[[list[Tensor]], Optimizer]
_FORMAT = 1
_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")


class ExpertOptimizer(Optimizer):
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

    steps_experts_apart = True  # what the guard of stage ``experts`` asks for

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        *,
        max_norm: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"ExpertOptimizer: max_norm must be positive, got {max_norm}")
        tower = find_tower(model)
        grouped, shared = _trainable(model, tower)
        if not grouped and not shared:
            raise ValueError("ExpertOptimizer: model must have trainable parameters, got none")
        check_sharding(grouped)
        self.num_experts = tower.config.num_experts
        self._names = list(grouped), list(shared)
        self._expert_names = tower.config.expert_names
        groups = [list(grouped.values()), list(shared.values())]
        experts = range(self.num_experts) if grouped else ()
        self._experts = [
            Part(make, [p.detach()[e] for p in groups[0]], max_norm, schedule) for e in experts
        ]
        self._shared = Part(make, groups[1], max_norm, schedule) if shared else None
        rates = [part.rate for part in (*self._experts[:1], self._shared) if part is not None]
        filled = [group for group in groups if group]
        super().__init__(
            [
                {"params": group, "lr": rate, "initial_lr": rate}
                for group, rate in zip(filled, rates, strict=True)
            ],
            {},
        )
        self._hits = torch.zeros(self.num_experts, dtype=torch.uint8)
        self.counting = True  # read by the hook
        self._silenced = False
        watch(tower, self)

    @property
    def steps(self) -> list[int]:
        """How many steps each expert has made."""
        return [part.steps for part in self._experts]

    @property
    def last_norms(self) -> dict[str, float]:
        """Norm of the gradient, before clipping, of each part the last ``step`` moved; waits for the device."""
        return {name: float(part.norm) for name, part in self._parts() if part.norm is not None}

    @property
    def last_rates(self) -> dict[str, float]:
        """Learning rate of each part that the last ``step`` moved (of its first group)."""
        moved = [(name, part) for name, part in self._parts() if part.norm is not None]
        return {name: float(part.inner.param_groups[0]["lr"]) for name, part in moved}

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step the experts hit since the last ``step`` or ``zero_grad``, and the shared parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        for _, part in self._parts():
            part.norm = None
        if self._experts:
            group = next(groups)
            scale = _scale(group)
            hits = self._hit_anywhere()
            if not any(hits):
                self._check_hits(group["params"])
            for e, hit in enumerate(hits):
                if hit:
                    self._experts[e].step_rows(group["params"], e, scale)
        if self._shared is not None:
            group = next(groups)
            self._shared.step(group["params"], _scale(group))
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the hits that belong to them."""
        super().zero_grad(set_to_none)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return all there is to go on bitwise; under FSDP2 whole tensors, and every process has to call it."""
        return {
            "mixpert_format": _FORMAT,
            "names": self._names[0],
            "shared_names": self._names[1],
            "rates": [group["lr"] for group in self.param_groups],
            "experts": [part.state_dict() for part in self._experts],
            "shared": None if self._shared is None else self._shared.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of the same parameters, sharded or not.

        Raises:
            ValueError: it is not an ExpertOptimizer's, or of another number of experts or other parameters.
        """
        self._check_state(state_dict)
        for group, rate in zip(self.param_groups, state_dict["rates"], strict=True):
            group["lr"] = rate
        for part, saved in zip(self._experts, state_dict["experts"], strict=True):
            part.load_state_dict(saved)
        if self._shared is not None:
            self._shared.load_state_dict(state_dict["shared"])

    def _check_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or state.get("mixpert_format") != _FORMAT:
            raise ValueError(
                "ExpertOptimizer.load_state_dict: state_dict must be an ExpertOptimizer's, got "
                f"{sorted(state)[:4] if isinstance(state, dict) else type(state).__name__}"
            )
        got, want = len(state["experts"]), len(self._experts)
        if got != want:
            raise ValueError(
                f"ExpertOptimizer.load_state_dict: state_dict must be of {want} experts, got {got}"
            )
        for key, names in zip(("names", "shared_names"), self._names, strict=True):
            other = sorted(set(names) ^ set(state[key]))
            if other or list(state[key]) != names:
                raise ValueError(
                    "ExpertOptimizer.load_state_dict: state_dict must be of the parameters that train, got a "
                    f"difference in {', '.join(other[:3]) or 'their order'}"
                )
        saved = [*state["experts"], *([state["shared"]] if self._shared is not None else [])]
        for (name, part), of_part in zip(self._parts(), saved, strict=True):
            part.check_state(name, of_part)

    def _check_hits(self, grouped: list[Tensor]) -> None:
        if self._silenced or all(p.grad is None for p in grouped):
            return
        raise RuntimeError(
            "ExpertOptimizer.step: some expert must have been hit since the last step, got gradients and no hit: make "
            "the optimizer before the batch's forward (and the first compiled one), or call hit(expert)"
        )

    def _forget(self) -> None:
        self._hits.zero_()
        self._silenced = False

    def _parts(self) -> Iterator[tuple[str, Part]]:
        names = self._expert_names or [f"expert_{e}" for e in range(self.num_experts)]
        yield from zip(names, self._experts, strict=False)
        if self._shared is not None:
            yield "shared", self._shared

    def _hit_anywhere(self) -> list[int]:
        if dist.is_available() and dist.is_initialized():
            device = self.param_groups[0]["params"][0].device
            self._hits = self._hits.to(device)
            dist.all_reduce(self._hits, op=dist.ReduceOp.MAX)
        return self._hits.tolist()


def _trainable(
    model: nn.Module, tower: nn.Module
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What trains, by name: of all experts (below the tower), and the rest."""
    grouped = {name: p for name, p in grouped_parameters(tower).items() if p.requires_grad}
    inside = {id(p) for p in grouped.values()}
    shared = {
        _plain(name): p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in inside
    }
    return {_plain(name): p for name, p in grouped.items()}, shared


def _plain(name: str) -> str:
    """A parameter's name without what wrapping (compile, DDP, checkpointing) puts in it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _scale(group: dict[str, Any]) -> float:
    """What a stock scheduler, or a user, has made of the group's rate."""
    return 1.0 if group["lr"] == group["initial_lr"] else group["lr"] / group["initial_lr"]
