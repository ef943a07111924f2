"""The shared layers: pixels to what the first expert layer is called with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixpert_kernels.backends.cpu.native import compute_dtype
from mixpert_kernels.modules import PreNormPlan
from mixpert_kernels.routing import Routing

from .families import Call, Family


def run_trunk(
    family: Family,
    trunk: nn.Module,
    plans: list[PreNormPlan | None],  # one a block; None: the block's own forward
    pixels: Tensor,  # (B, C, H, W)
    interpolate: bool,
) -> Call:
    """Return x (B, T, D) in the dtype of ``trunk``, and what its blocks take besides.

    A frozen trunk keeps nothing for backward, and runs by its plans in training too.
    """
    if torch.is_grad_enabled():
        if pixels.requires_grad or any(p.requires_grad for p in trunk.parameters()):
            plans = [None] * len(plans)
        else:
            with torch.no_grad():
                return run_trunk(family, trunk, plans, pixels, interpolate)
    blocks = trunk.get_submodule(family.blocks)
    dtype = wide = trunk.dtype
    if trunk.device.type == "cpu" and compute_dtype(dtype) != dtype:
        # A CPU without bfloat16 instructions: float32 features from pixels to the last block, converted once. Plans
        # take them beside narrow weights; a block's own forward would not.
        pairs = zip(plans, blocks, strict=True)
        if all(plan is not None and plan.serves(block, family.args) for plan, block in pairs):
            wide = compute_dtype(dtype)
    x, args, kwargs = _embed(family, trunk, pixels.to(wide), interpolate)
    x = x.contiguous()  # SigLIP's is a transposed view, which each reader would copy
    single = Routing.single(x.shape[0], x.device) if any(plans) else None
    for block, plan in zip(blocks, plans, strict=True):
        if plan is not None and plan.serves(block, args, kwargs):
            x = plan.run(block, x, single)
            continue
        x = block(x, *args, **kwargs)
        x = x[0] if isinstance(x, tuple) else x
    return x.to(dtype), args, kwargs


def fuses_routing(x: Tensor) -> bool:
    """Whether routing is one launch with what comes after it: on a GPU, where no gradient is needed.

    Not measured on a GPU yet: it saves two launches of the three.
    """
    return x.device.type == "cuda" and not torch.is_grad_enabled()


def _embed(family: Family, model: nn.Module, pixels: Tensor, interpolate: bool) -> Call:
    """Return what the model's first block is called with, computed in the dtype of ``pixels``."""
    if pixels.dtype == model.dtype:
        return family.embed(model, pixels, interpolate)
    blocks = f"{family.blocks}."
    parameters = {
        f"model.{name}": p.to(pixels.dtype)
        for name, p in model.named_parameters()
        if p.is_floating_point() and not name.startswith(blocks)
    }
    return functional_call(_Embedding(family, model), parameters, (pixels, interpolate))


class _Embedding(nn.Module):
    """``family.embed`` as a module, so that it can be called with other parameters."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model

    def forward(self, pixels: Tensor, interpolate: bool) -> Call:
        return self.family.embed(self.model, pixels, interpolate)
