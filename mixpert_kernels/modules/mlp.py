"""The fused plan of projectors of two linear layers: the activation in the first product's epilogue."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mixpert_kernels.routing import Routing

from .leaves import activation_name, exists, get, is_hooked, is_plain, mlp


@dataclass(frozen=True)
class MlpPlan:
    """Where the two layers and the activation are: a path each, below the block."""

    first: str
    activation: str
    second: str

    @staticmethod
    def of(block: nn.Module) -> MlpPlan | None:
        """Return the plan of Sequential(Linear, act, Linear) and LLaVA's projectors; None for any other."""
        plan = PLANS.get(type(block).__name__)
        if plan is None or len(list(block.children())) != 3:
            return None
        paths = (plan.first, plan.activation, plan.second)
        return plan if all(exists(block, path) for path in paths) and plan.serves(block) else None

    def serves(self, block: nn.Module, args: tuple = (), kwargs: dict | None = None) -> bool:
        """Whether the plan computes what the block's own forward would, for this call."""
        if args or kwargs or any(is_hooked(module) for module in block.modules()):
            return False
        if activation_name(get(block, self.activation)) is None:  # it may have been replaced since
            return False
        return all(is_plain(leaf) for leaf in (get(block, self.first), get(block, self.second)))

    def run(self, block: nn.Module, x: Tensor, routing: Routing) -> Tensor:
        name = activation_name(get(block, self.activation))
        return mlp(x, get(block, self.first), get(block, self.second), routing, activation=name)


_LLAVA = MlpPlan("linear_1", "act", "linear_2")
PLANS = {
    "Sequential": MlpPlan("0", "1", "2"),
    "LinearActLinear": _LLAVA,
    "LlavaMultiModalProjector": _LLAVA,
    "LlavaNextMultiModalProjector": _LLAVA,
    "LlavaOnevisionMultiModalProjector": _LLAVA,
}
