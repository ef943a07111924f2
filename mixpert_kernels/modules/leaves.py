"""What the fused plans know of leaves: which are plain, and how to call an op by their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixpert_kernels.ops import (
    RouterWeights,
    Strategy,
    grouped_layer_norm,
    grouped_linear,
    grouped_mlp,
    norm_grouped_linear,
    route_grouped_linear,
)
from mixpert_kernels.routing import Routing

from .grouped import GroupedLayerNorm, GroupedLinear

ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "Identity": "none",
    "LinearActivation": "none",
}


def linear(
    x: Tensor,
    leaves: tuple[nn.Module, ...],
    routing: Routing,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """grouped_linear by the parameters of leaves, grouped or plain, side by side."""
    return grouped_linear(
        x, *_side_by_side(leaves), routing, activation=activation, residual=residual, scale=scale
    )


def norm_linear(
    x: Tensor,
    norm: nn.Module,
    leaves: tuple[nn.Module, ...],
    routing: Routing,
    *,
    activation: str = "none",
) -> Tensor:
    """norm_grouped_linear by the parameters of a norm and of leaves, side by side."""
    given = (*_norm_parameters(norm), *_side_by_side(leaves))
    return norm_grouped_linear(x, *given, routing, norm_eps=norm.eps, activation=activation)


def routed_linear(
    x: Tensor,
    router: RouterWeights,
    strategy: Strategy,
    norm: nn.Module,
    leaves: tuple[nn.Module, ...],
    **options: Any,
) -> tuple[Tensor, Routing]:
    """route_grouped_linear by the parameters of a norm and of leaves, side by side."""
    gain, offset = _norm_parameters(norm)
    given = (router, strategy, gain, offset, *_side_by_side(leaves))
    return route_grouped_linear(x, *given, norm_eps=norm.eps, **options)


def mlp(
    x: Tensor,
    first: nn.Module,
    second: nn.Module,
    routing: Routing,
    *,
    activation: str,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """grouped_mlp by the parameters of two leaves, grouped or plain."""
    parameters = [
        None if p is None else _grouped(p, ndim)
        for leaf in (first, second)
        for p, ndim in ((leaf.weight, 3), (leaf.bias, 2))
    ]
    return grouped_mlp(
        x, *parameters, routing, activation=activation, residual=residual, scale=scale
    )


def layer_norm(x: Tensor, leaf: nn.Module, routing: Routing) -> Tensor:
    return grouped_layer_norm(x, *_norm_parameters(leaf), routing, eps=leaf.eps)


def _norm_parameters(leaf: nn.Module) -> tuple[Tensor, Tensor | None]:
    return _grouped(leaf.weight, 2), None if leaf.bias is None else _grouped(leaf.bias, 2)


def _side_by_side(leaves: tuple[nn.Module, ...]) -> tuple[list[Tensor], list[Tensor] | None]:
    weights = [_grouped(leaf.weight, 3) for leaf in leaves]
    biases = [_grouped(leaf.bias, 2) for leaf in leaves if leaf.bias is not None]
    return weights, biases or None


def activation_name(module: nn.Module) -> str | None:
    """The name grouped_linear knows an activation module by; None if it knows none."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return ACTIVATION_CLASSES.get(type(module).__name__)


def is_plain(leaf: object) -> bool:
    """Exactly a leaf whose parameters are all there is to it: no wrapper, no hook, no replaced forward."""
    return (
        type(leaf) in (nn.Linear, nn.LayerNorm, GroupedLinear, GroupedLayerNorm)
        and leaf.weight is not None
        and not parametrize.is_parametrized(leaf)
    )


# transformers leaves these on every block of a model once asked for hidden states; they do nothing but while it
# gathers them, which it does not do around a tower's blocks.
INERT_HOOKS = "transformers.utils.output_capturing"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other, than its class says."""
    tables = (module._forward_hooks, module._forward_pre_hooks)
    tables += (module._backward_hooks, module._backward_pre_hooks)
    if "forward" in module.__dict__:
        return True
    return any(
        getattr(hook, "__module__", None) != INERT_HOOKS
        for table in tables
        for hook in table.values()
    )


def in_place(module: nn.Module, read: Callable[[], Any]) -> Any:
    """Return what ``read`` does of the parameters of ``module`` without calling it.

    accelerate may keep them elsewhere, and has them in place while the modules that they belong to run.
    """
    hooked = [m for m in module.modules() if hasattr(m, "_hf_hook")]
    for m in hooked:
        m._hf_hook.pre_forward(m)
    try:
        return read()
    finally:
        for m in hooked:
            m._hf_hook.post_forward(m, None)


def get(block: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)


def exists(block: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        holder = block.get_submodule(owner)
    except AttributeError:
        return False
    # hasattr would read a parametrized attribute, which needs a bound routing
    return parametrize.is_parametrized(holder, name) or hasattr(holder, name)


def _grouped(parameter: Tensor, ndim: int) -> Tensor:
    """The parameter with its expert dimension; a plain leaf is one expert."""
    return parameter if parameter.ndim == ndim else parameter.unsqueeze(0)
