"""Make experts of any block: swap its leaves for grouped ones and let its own forward run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixpert_kernels.routing import Routing

from .binding import bind
from .grouped import (
    GroupedLayerNorm,
    GroupedLinear,
    GroupedParameter,
    GroupedRMSNorm,
    stacked,
)
from .mlp import MlpPlan
from .prenorm import PreNormPlan


def _rms_norm(offset: float) -> Callable[[nn.Module, int], GroupedRMSNorm]:
    def clone(leaf: nn.Module, num_experts: int) -> GroupedRMSNorm:
        if leaf.weight is None or leaf.weight.ndim != 1:
            raise ValueError("normalises over several dimensions or has no gain")
        names = [n for n in ("eps", "variance_epsilon") if hasattr(leaf, n)]
        if not names:
            raise ValueError("has no eps")
        eps = getattr(leaf, names[0])
        return GroupedRMSNorm(stacked(leaf.weight, num_experts), eps, offset)

    return clone


def _llama_rms_norm(leaf: nn.Module, num_experts: int) -> GroupedRMSNorm:
    """Clone an RMSNorm this file doesn't list, once it has been seen to compute what Llama's does."""
    grouped = _rms_norm(offset=0.0)(leaf, num_experts)
    if not leaf.weight.is_meta:
        wide = copy.deepcopy(leaf).float()
        with torch.no_grad():
            x = torch.linspace(-1, 2, len(leaf.weight), device=leaf.weight.device).expand(1, 1, -1)
            wanted = F.rms_norm(x, x.shape[-1:], wide.weight, grouped.eps)
            if not torch.allclose(wide(x), wanted, rtol=1e-4, atol=1e-4):
                raise ValueError("computes something else than x / rms(x) * weight")
    return grouped


# Leaves by class name: how to make E copies. A name that ends in RMSNorm and is not here is Llama's kind.
LEAVES: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "Linear": GroupedLinear.clone,
    "LayerNorm": GroupedLayerNorm.clone,
    "Gemma3RMSNorm": _rms_norm(offset=1.0),
    "GemmaRMSNorm": _rms_norm(offset=1.0),
    "Gemma2RMSNorm": _rms_norm(offset=1.0),
}

# Loose matrices, (class, parameter), that their module multiplies by: matmul(x, W) with x (B, T, K), W (K, N).
# Loose vectors need no row: each multiplies or is added to (B, T, D).
LOOSE_MATRICES = {("Gemma3MultiModalProjector", "mm_input_projection_weight")}


# Modules that call a leaf with the tiles along dimension 1: where T equals B its routes would be mixed up unseen.
TRANSPOSED = ("MLCDAttention",)

_LOOSE = re.compile(r"parametrizations\.(\w+)\.original")


class ExpertBlock(nn.Module):
    """A block whose every parameter has E copies; each tile of a batch goes through its expert's.

    Made by ``expertize``. The block's own forward runs, whatever its architecture; where the block is a known pre-LN
    ViT block, a fused plan computes the same from the same parameters (``plan`` is then not None).
    """

    gradient_checkpointing = (
        False  # set, with _gradient_checkpointing_func, by transformers' models
    )

    def __init__(self, block: nn.Module, num_experts: int, template: nn.Module) -> None:
        super().__init__()
        self.block, self.num_experts = block, num_experts
        self.plan = PreNormPlan.of(block) or MlpPlan.of(block)
        self._template = (template,)  # on the meta device; in a tuple, so that it is no submodule

    def forward(self, x: Tensor, routing: Routing, *args, **kwargs) -> Tensor:
        """Run the block on tiles ``x`` (B, T, D) under ``routing``; further arguments go to the block as they are.

        Where ``routing.cu_seqlens`` is given, x is packed rows (R, D), and the block's own forward keeps the tiles
        apart: attention has to be told of them by an argument.
        """
        if self.gradient_checkpointing and self.training:
            # This module is the unit that is run again in backward. Were the block inside one of its own, its second
            # run would find no routing bound.
            for module in self.block.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False
            run = partial(self._run, **kwargs)  # the reentrant kind takes no keywords
            return self._gradient_checkpointing_func(run, x, routing, *args)
        return self._run(x, routing, *args, **kwargs)

    def _run(self, x: Tensor, routing: Routing, *args, **kwargs) -> Tensor:
        self._check(x, routing)
        # A plan with attention is of (B, T, D).
        apart = routing.cu_seqlens is None or isinstance(self.plan, MlpPlan)
        if self.plan is not None and apart and self.plan.serves(self.block, args, kwargs):
            return self.plan.run(self.block, x, routing)
        before = bind(routing, x.shape[0])
        try:
            y = self.block(x, *args, **kwargs)
        finally:
            bind(*before)
        return y[0] if isinstance(y, tuple) else y

    def can_route(self, args: tuple = (), kwargs: dict | None = None) -> bool:
        """Whether ``run_routed`` computes what routing first and ``forward`` next would, for this call."""
        return isinstance(self.plan, PreNormPlan) and self.plan.serves(self.block, args, kwargs)

    def run_routed(self, x: Tensor, *router: Any, **options: Any) -> tuple[Tensor, Routing]:
        """Route tiles ``x`` (B, T, D) and run the block on them; the arguments are those of ``PreNormPlan``'s."""
        return self.plan.run_routed(self.block, x, *router, **options)

    def _check(self, x: Tensor, routing: Routing) -> None:
        """A loose parameter broadcasts: over an x of another rank or batch it would be wrong without an error."""
        if not isinstance(routing, Routing):
            raise ValueError(
                f"ExpertBlock: routing must be a Routing, got {type(routing).__name__}"
            )
        packed = routing.cu_seqlens is not None
        if x.ndim != (2 if packed else 3):
            shape = "(R, D)" if packed else "(B, T, D)"
            raise ValueError(f"ExpertBlock: x must have shape {shape}, got {tuple(x.shape)}")
        tiles = len(routing.cu_seqlens) - 1 if packed else len(x)
        got = (len(routing.expert), routing.num_experts)
        if got != (tiles, self.num_experts):
            raise ValueError(
                f"ExpertBlock: routing must be of {tiles} tiles over {self.num_experts} experts, "
                f"got {got[0]} over {got[1]}"
            )

    def select(self, expert: int) -> nn.Module:
        """Return expert ``expert`` as the plain block it was cloned from, with parameters of its own."""
        plain = copy.deepcopy(self._template[0])
        state = {
            _LOOSE.sub(r"\1", name): parameter[expert].detach().clone()
            for name, parameter in self.block.named_parameters()
        }
        for name, buffer in self.block.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(owner), leaf, buffer.detach().clone())
        plain.load_state_dict(state, strict=False, assign=True)
        plain.train(self.training)
        return plain

    def reclone(self, num_experts: int) -> None:
        """Make ``num_experts`` copies of expert 0, in place.

        With another number of experts every parameter is a new one: an optimizer made before holds the old ones.
        """
        for module in self.block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, stacked(parameter[0], num_experts))
            if isinstance(module, GroupedLinear):
                module.num_experts = num_experts
        self.num_experts = num_experts


def expertize(block: nn.Module, num_experts: int) -> ExpertBlock:
    """Clone ``block`` into ``num_experts`` experts.

    Linear layers, LayerNorms, RMSNorms and loose parameters (such as a LayerScale) become grouped leaves that hold E
    copies and read the batch's routing; the structure, and with it the block's own forward, stays. ``block`` itself is
    not changed.

    Args:
        block: any module that maps (B, T, D) to (B, T, D') and keeps the tiles apart along dimension 0.
        num_experts: E >= 1.

    Returns:
        ExpertBlock, called as ``experts(x, routing, ...)``.

    Raises:
        ValueError: a leaf cannot be cloned; the message names it.

    Example:
        >>> import torch
        >>> experts = expertize(torch.nn.Linear(4, 2), num_experts=3)
        >>> experts(torch.ones(2, 5, 4), Routing.forced(torch.tensor([2, 0]), 3)).shape
        torch.Size([2, 5, 2])
    """
    if num_experts < 1:
        raise ValueError(f"expertize: num_experts must be at least 1, got {num_experts}")
    template = copy_of(block).to("meta")
    clone = group_leaves(copy_of(block), num_experts, _parametrize)
    return ExpertBlock(clone, num_experts, template)


def group_leaves(
    block: nn.Module, num_experts: int, loosen: Callable[[nn.Module, list[str]], None]
) -> nn.Module:
    """Swap the leaves of ``block`` for grouped ones, in place.

    Args:
        block: changed in place, and returned unless it is a leaf itself.
        num_experts: E.
        loosen: called with each module that has loose parameters and their names, once these hold E copies, to have
            the module read the rows of the batch's experts.

    Raises:
        ValueError: a leaf cannot be cloned; some of the block may have been swapped.
    """
    return _swap(block, lambda leaf, path: _cloned(leaf, path, num_experts, loosen))


def _parametrize(module: nn.Module, names: list[str]) -> None:
    for name in names:
        parametrize.register_parametrization(module, name, GroupedParameter(), unsafe=True)


def copy_of(block: nn.Module) -> nn.Module:
    """A deep copy that shares configurations, so that switching a model's attention reaches its experts."""
    configs = [m.config for m in block.modules() if hasattr(m, "config")]
    return copy.deepcopy(block, {id(config): config for config in configs})


def _swap(module: nn.Module, replace: Callable, path: str = "") -> nn.Module:
    """Replace, from the leaves up, every module for which ``replace`` has a substitute."""
    substitute = replace(module, path)
    if substitute is not None:
        return substitute.train(module.training)
    for name, child in list(module.named_children()):
        if name != "parametrizations":
            setattr(module, name, _swap(child, replace, f"{path}.{name}".lstrip(".")))
    return module


def _cloned(
    leaf: nn.Module, path: str, num_experts: int, loosen: Callable[[nn.Module, list[str]], None]
) -> nn.Module | None:
    name = type(leaf).__name__
    clone = LEAVES.get(name)
    if hasattr(nn, name) and type(leaf) is not getattr(nn, name):
        clone = None  # another class of that name: its own forward runs, on loose parameters
    if clone is None and name.endswith("RMSNorm") and hasattr(leaf, "weight"):
        clone = _llama_rms_norm
    where = path or "the block itself"
    if name in TRANSPOSED:
        raise ValueError(
            f"expertize: cannot clone {name} at {where}: it calls its leaves with tokens before tiles"
        )
    if clone is not None:
        try:
            return clone(leaf, num_experts)
        except ValueError as reason:
            raise ValueError(f"expertize: cannot clone {name} at {where}: it {reason}") from None
    loose = dict(leaf.named_parameters(recurse=False))
    if loose and type(leaf).__module__.startswith("torch.nn"):
        raise ValueError(f"expertize: cannot clone {name} at {where}: no grouped leaf for it")
    for parameter, value in loose.items():
        if value.ndim != 1 and (name, parameter) not in LOOSE_MATRICES:
            raise ValueError(
                f"expertize: cannot clone parameter {parameter} of {name} at {where}: it has shape "
                f"{tuple(value.shape)}, and only vectors and the rows of LOOSE_MATRICES are known"
            )
    for parameter, value in loose.items():
        setattr(leaf, parameter, stacked(value, num_experts))
    if loose:
        loosen(leaf, list(loose))
    return None
