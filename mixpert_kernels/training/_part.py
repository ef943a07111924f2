"""One expert of an ExpertOptimizer, or what all share: an inner optimizer, its step count, clipping and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._sharded import scattered, whole


class Part:
    """An inner optimizer over tensors that are given anew at each step: views move when a model does.

    Args:
        make: makes the inner optimizer of the tensors.
        tensors: what it steps.
        max_norm: of their gradient; None for no clipping.
        schedule: factor on the learning rate by the number of steps made; None for 1.
    """

    def __init__(
        self,
        make: Callable[[list[Tensor]], Optimizer],
        tensors: list[Tensor],
        max_norm: float | None,
        schedule: Callable[[int], float] | None,
    ) -> None:
        self.inner = make(list(tensors))
        self.max_norm, self.schedule = max_norm, schedule
        self.steps = 0
        self.norm: Tensor | None = None  # of the last step's gradient; None where it was not moved
        place = {id(tensor): i for i, tensor in enumerate(tensors)}
        held = [[place.get(id(t)) for t in group["params"]] for group in self.inner.param_groups]
        flat = [i for group in held for i in group]
        if None in flat or sorted(flat) != list(range(len(tensors))):
            raise ValueError(
                "ExpertOptimizer: make must return an optimizer of exactly the tensors it is given, got one of "
                f"{len(flat)} instead of {len(tensors)}"
            )
        self._held = held  # by group: which of the tensors
        self._tensors = list(tensors)
        for group in self.inner.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def rate(self) -> float:
        return self.inner.param_groups[0]["initial_lr"]

    def step_rows(self, parameters: list[Tensor], expert: int, scale: float) -> None:
        """Step row ``expert`` of parameters (E, ...)."""
        rows = []
        for parameter in parameters:
            row = parameter.detach()[expert]
            row.grad = None if parameter.grad is None else parameter.grad[expert]
            rows.append(row)
        self.step(rows, scale)
        for row in rows:
            row.grad = None

    def step(self, tensors: list[Tensor], scale: float) -> None:
        """Step ``tensors``, the ones this part was made of or their successors, where they have gradients."""
        gradients = [t.grad for t in tensors if t.grad is not None]
        if not gradients:
            return
        self._take(tensors)
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_norm is not None:
            owners = [t for t in tensors if t.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(owners, self.max_norm, self.norm)
        self.norm = whole(self.norm)
        factor = scale if self.schedule is None else self.schedule(self.steps) * scale
        for group in self.inner.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.inner.step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        state = self.inner.state_dict()
        tensors = self._in_order()
        shapes = [list(t.shape) for t in tensors]
        of_tensors = {
            i: {key: whole(value) for key, value in of_one.items()}
            for i, of_one in state["state"].items()
        }
        groups = state["param_groups"]
        return {"steps": self.steps, "shapes": shapes, "state": of_tensors, "param_groups": groups}

    def check_state(self, name: str, saved: dict[str, Any]) -> None:
        """Raise ValueError unless a state fits."""
        got, want = saved["shapes"], [list(t.shape) for t in self._in_order()]
        if got != want:
            wrong = next(
                (pair for pair in zip(got, want, strict=False) if pair[0] != pair[1]),
                (len(got), len(want)),
            )
            raise ValueError(
                f"ExpertOptimizer.load_state_dict: state_dict of {name} must be of parameters of shape {wrong[1]}, "
                f"got {wrong[0]}"
            )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        tensors = self._in_order()
        of_tensors = {
            i: {key: scattered(value, tensors[i]) for key, value in of_one.items()}
            for i, of_one in saved["state"].items()
        }
        self.inner.load_state_dict({"state": of_tensors, "param_groups": saved["param_groups"]})
        self.steps = saved["steps"]

    def _in_order(self) -> list[Tensor]:
        """The tensors as the inner optimizer's state counts them: group by group."""
        return [self._tensors[i] for group in self._held for i in group]

    def _take(self, tensors: list[Tensor]) -> None:
        """Put the inner optimizer, with its state, on other tensors."""
        for group, held in zip(self.inner.param_groups, self._held, strict=True):
            group["params"] = [tensors[i] for i in held]
        for old, new in zip(self._tensors, tensors, strict=True):
            if old is not new and old in self.inner.state:
                self.inner.state[new] = self.inner.state.pop(old)
        self._tensors = list(tensors)
