"""AdapterOptimizer: each adapter of a MoME model moves only where its layer's router chose it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._parted import Make, PartedOptimizer, trainable_apart
from .mome_stages import adapter_parameters, language_experts


class AdapterOptimizer(PartedOptimizer):
    """Steps each adapter by an optimizer of its own, and only when its layer's router chose it for some sample.

    A parameter (K, ...) of a layer holds all its adapters. A stock optimizer over it would decay adapters that no
    sample was sent to, move them by old momentum and count their steps. Here adapter k of a layer is the parameters
    p[k], with an inner optimizer, a step count and a clip norm of its own. All other trainable parameters belong to one
    more, "shared", which steps whenever it has gradients.

    An adapter was chosen where its gradient is not zero in every number: that of an adapter which no sample chose is
    exactly zero. In a process group gradients are of all processes' samples once DDP has reduced them, and so is this.

    Args:
        model: what ``set_mome_stage`` was called on; its trainable parameters of now are those that train.
        make: makes an inner optimizer of a list of tensors, each a parameter of one adapter, in the model's order; it
            may put them in several groups. ``functools.partial(torch.optim.AdamW, lr=5e-4)``.
        max_norm: clip the gradient of each adapter, and of the shared parameters, to this norm; None for no clipping.
        schedule: factor on the learning rate by the number of steps this optimizer made before, from 0: one clock for
            all, unlike ExpertOptimizer's, for which adapter a sample gets is learnt.

    Raises:
        ValueError: no trainable parameters, no MixtureOfLanguageExperts, or ``max_norm`` not positive.

    Cost:
        Reads the adapters' gradients once; one copy of layers * K numbers from the device a step, the only wait.
        Launches: those of the chosen adapters' inner optimizers, one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        *,
        max_norm: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        sets, shared = trainable_apart(model, adapter_parameters(model))
        experts = next(iter(language_experts(model).values())).experts
        self._made = 0
        clock = None if schedule is None else lambda steps: schedule(self._made)
        super().__init__(sets, experts, shared, make, max_norm, clock)

    @property
    def last_norms(self) -> dict[str, float]:
        """Norm of the gradient, before clipping, of all adapters the last ``step`` moved and of what they share."""
        norms = super().last_norms
        shared = {name: norms.pop(name) for name in ("shared",) if name in norms}
        adapters = {"adapters": sum(n * n for n in norms.values()) ** 0.5} if norms else {}
        return adapters | shared

    @contextlib.contextmanager
    def no_hits(self) -> Iterator[None]:
        """Run the model on a sample whose losses are sliced away: its gradients are zero, and choose nothing."""
        yield

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step the adapters that samples chose since the last ``zero_grad``, and the shared parameters."""
        loss = super().step(closure)
        self._made += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return all there is to go on bitwise."""
        return {**super().state_dict(), "made": self._made}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of the same parameters.

        Raises:
            ValueError: it is no AdapterOptimizer's, or of another number of adapters or other parameters.
        """
        super().load_state_dict(state_dict)
        self._made = state_dict["made"]

    def _hit_experts(self) -> list[list[int]]:
        if not self._sets:
            return []
        sets = self.param_groups[: len(self._sets)]
        return torch.stack([_moved(group["params"]) for group in sets]).tolist()

    def _expert_names(self) -> list[str]:
        layers = range(len(self._sets))
        return [f"layer_{i}.expert_{k}" for i in layers for k in range(self.num_experts)]


def _moved(parameters: list[Tensor]) -> Tensor:  # (K,) bool
    """Which rows of parameters (K, ...) have a gradient."""
    found = torch.zeros(len(parameters[0]), dtype=torch.bool, device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None:
            found |= (parameter.grad != 0).reshape(len(found), -1).any(1)
    return found
