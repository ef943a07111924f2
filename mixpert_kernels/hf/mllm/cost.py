"""What experts add to a vision-language model: counted, not measured."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .blocks import Expert
from .mixpertize import owner_of


class AddedCost(NamedTuple):
    """What a mixpertized model has and does beyond the plain one.

    Attributes:
        parameters: how many more there are: E - 1 copies of the blocks and the projector, and the router.
        share: ``parameters`` over the plain model's.
        flop: multiplications and additions of the router's products, for one image.
        flop_per_token: additions of its mean, for each token of the base tile.

    The experts add no arithmetic: each tile goes through one.
    """

    parameters: int
    share: float
    flop: int
    flop_per_token: int


def added_cost(model: nn.Module) -> AddedCost:
    """Count what experts add to ``model``, in memory and in arithmetic.

    Args:
        model: a mixpertized model.

    Raises:
        ValueError: the model has no experts.

    Example:
        >>> added_cost(model).parameters  # doctest: +SKIP
        25196548
    """
    owner = owner_of("added_cost", model)
    settings, router = owner.mixpert_settings, owner.mixpert_router
    grouped = [p.numel() for m in owner.modules() if isinstance(m, Expert) for p in m.parameters()]
    copies = sum(grouped) // settings.num_experts * (settings.num_experts - 1)
    parameters = copies + sum(p.numel() for p in router.parameters())
    plain = sum(p.numel() for p in model.parameters()) - parameters

    weights = [p for p in router.parameters() if p.ndim == 2]
    width = router.norm.weight.numel()
    return AddedCost(parameters, parameters / plain, 2 * sum(p.numel() for p in weights), width)
