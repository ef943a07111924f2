"""An optimizer of parts: rows of parameters that hold several experts, and what all experts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._part import Part

Make = Callable[[list[Tensor]], Optimizer]
Named = dict[str, nn.Parameter]
_FORMAT = 1
_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")


class PartedOptimizer(Optimizer):
    """Steps each part by an inner optimizer of its own, and an expert's part only where it was hit.

    A set of experts is chosen from by one router: its parameters (E, ...) hold expert e in row e, which is a part. All
    other parameters are one more part, "shared", which steps whenever it has gradients.

    Args:
        sets: each set's parameters by name; a set without any is left out.
        num_experts: E, of each set.
        shared: the other parameters by name.
        make: makes an inner optimizer of a list of tensors.
        max_norm: clip each part's gradient to this norm; None for no clipping.
        schedule: factor on the learning rate by the number of steps a part has made.
    """

    steps_experts_apart = True  # what the guard of stage ``experts`` asks for

    def __init__(
        self,
        sets: Sequence[Named],
        num_experts: int,
        shared: Named,
        make: Make,
        max_norm: float | None,
        schedule: Callable[[int], float] | None,
    ) -> None:
        caller = type(self).__name__
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{caller}: max_norm must be positive, got {max_norm}")
        sets = [named for named in sets if named]
        if not sets and not shared:
            raise ValueError(f"{caller}: model must have trainable parameters, got none")
        self.num_experts = num_experts
        self._names = [name for named in sets for name in named], list(shared)
        self._sets = [
            [
                Part(make, [p.detach()[e] for p in named.values()], max_norm, schedule)
                for e in range(num_experts)
            ]
            for named in sets
        ]
        self._shared = Part(make, list(shared.values()), max_norm, schedule) if shared else None
        firsts = [parts[0] for parts in self._sets]
        firsts += [self._shared] if self._shared is not None else []
        held = [*sets, *([shared] if shared else [])]
        super().__init__(
            [
                {"params": list(named.values()), "lr": first.rate, "initial_lr": first.rate}
                for named, first in zip(held, firsts, strict=True)
            ],
            {},
        )

    @property
    def steps(self) -> list[int]:
        """How many steps each expert has made, set by set."""
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
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step the experts that the gradients are of, and the shared parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, part in self._parts():
            part.norm = None
        groups = iter(self.param_groups)
        for parts, hits in zip(self._sets, self._hit_experts(), strict=True):
            group = next(groups)
            scale = _scale(group)
            for e, hit in enumerate(hits):
                if hit:
                    parts[e].step_rows(group["params"], e, scale)
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
            ValueError: it is no such optimizer's, or of another number of experts or other parameters.
        """
        self._check_state(state_dict)
        for group, rate in zip(self.param_groups, state_dict["rates"], strict=True):
            group["lr"] = rate
        for part, saved in zip(self._experts, state_dict["experts"], strict=True):
            part.load_state_dict(saved)
        if self._shared is not None:
            self._shared.load_state_dict(state_dict["shared"])

    def _hit_experts(self) -> list[list[int]]:
        """Of each set, which experts ``step`` is to move; the same in every process."""
        raise NotImplementedError

    def _expert_names(self) -> list[str]:
        """A name an expert, set by set."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Forget what the next step was told."""

    @property
    def _experts(self) -> list[Part]:
        return [part for parts in self._sets for part in parts]

    def _parts(self) -> Iterator[tuple[str, Part]]:
        yield from zip(self._expert_names(), self._experts, strict=False)
        if self._shared is not None:
            yield "shared", self._shared

    def _check_state(self, state: dict[str, Any]) -> None:
        caller = type(self).__name__
        if not isinstance(state, dict) or state.get("mixpert_format") != _FORMAT:
            raise ValueError(
                f"{caller}.load_state_dict: state_dict must be an {caller}'s, got "
                f"{sorted(state)[:4] if isinstance(state, dict) else type(state).__name__}"
            )
        got, want = len(state["experts"]), len(self._experts)
        if got != want:
            raise ValueError(
                f"{caller}.load_state_dict: state_dict must be of {want} experts, got {got}"
            )
        for key, names in zip(("names", "shared_names"), self._names, strict=True):
            other = sorted(set(names) ^ set(state[key]))
            if other or list(state[key]) != names:
                raise ValueError(
                    f"{caller}.load_state_dict: state_dict must be of the parameters that train, got a difference in "
                    f"{', '.join(other[:3]) or 'their order'}"
                )
        saved = [*state["experts"], *([state["shared"]] if self._shared is not None else [])]
        for (name, part), of_part in zip(self._parts(), saved, strict=True):
            part.check_state(name, of_part)


def trainable_apart(model: nn.Module, sets: Sequence[Named]) -> tuple[list[Named], Named]:
    """What trains, by plain name: of each set, and the rest of the model."""
    inside = {id(p) for named in sets for p in named.values()}
    shared = {
        _plain(name): p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in inside
    }
    return [{_plain(n): p for n, p in named.items() if p.requires_grad} for named in sets], shared


def _plain(name: str) -> str:
    """A parameter's name without what wrapping (compile, DDP, checkpointing) puts in it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _scale(group: dict[str, Any]) -> float:
    """What a stock scheduler, or a user, has made of the group's rate."""
    return 1.0 if group["lr"] == group["initial_lr"] else group["lr"] / group["initial_lr"]
