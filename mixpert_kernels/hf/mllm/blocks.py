"""Blocks and projectors with experts, in the place of the plain ones and under their class and parameter names.

A module's leaves are swapped for grouped ones and its class for a subclass of the same name. Whatever goes by
``isinstance``, by a class's or a parameter's name or by hooks finds what it found before.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from mixpert_kernels.hf.subclass import plain_class, subclass
from mixpert_kernels.modules.binding import bind, peek
from mixpert_kernels.modules.by_expert import by_expert
from mixpert_kernels.modules.expertize import copy_of, group_leaves
from mixpert_kernels.modules.grouped import rows_of
from mixpert_kernels.modules.mlp import MlpPlan
from mixpert_kernels.modules.prenorm import PreNormPlan
from mixpert_kernels.routing import Routing

from . import scope

ROUTING = "mixpert_routing"  # the argument by which a block hands its routing to its own forward
FLAGS = ("output_hidden_states", "output_attentions")  # passed down to blocks, which ignore them


class Loose(nn.Module):
    """A module whose own parameters read, while it runs, as the rows of the batch's experts."""

    mixpert_loose: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in self.mixpert_loose:
            routing, rows = peek()
            return value if routing is None else rows_of(value, routing, rows)
        return value


class Planned(nn.Module):
    """A module that a plan may run instead of its own forward, call by call."""

    mixpert_plan: PreNormPlan | MlpPlan | None

    def _fuses(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the plan computes this call, and the attention is sdpa's, which returns no weights."""
        if self.mixpert_plan is None or not args:
            return False
        configs = [m.config for m in self.modules() if hasattr(m, "config")]
        if any(getattr(c, "_attn_implementation", "sdpa") != "sdpa" for c in configs):
            return False
        given = {name: value for name, value in kwargs.items() if name not in FLAGS}
        return self.mixpert_plan.serves(self, args[1:], given)


class TrunkLayer(Planned):
    """A block of the vision tower that all experts share: in inference by the plan, as a block of one expert.

    The compiler gets the block's own code, which it fuses itself, and so does autocast, which the plan's ops ignore.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_inference(args) and self._fuses(args, kwargs):
            x = args[0].contiguous()  # SigLIP's embeddings are a transposed view: a copy a reader
            with torch.no_grad():
                return self.mixpert_plan.run(self, x, scope.shared(x))
        return super().forward(*args, **kwargs)

    def _is_inference(self, args: tuple) -> bool:
        if torch.compiler.is_compiling() or not args:
            return False
        if torch.is_autocast_enabled(args[0].device.type):
            return False
        tensors = (args[0], *self.parameters()) if torch.is_grad_enabled() else ()
        return not any(t.requires_grad for t in tensors)


class Expert(Planned):
    """A block or projector with experts: routed as its scope says."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs[ROUTING] = self._routing(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing: Routing = kwargs.pop(ROUTING)
        if self._fuses(args, kwargs):
            return by_expert(functools.partial(self.mixpert_plan.run, self), args[0], routing)
        x = args[0] if args else next(iter(kwargs.values()))
        before = bind(routing, len(x))
        try:
            return super().forward(*args, **kwargs)
        finally:
            bind(*before)

    def _routing(self, *args: Any, **kwargs: Any) -> Routing:
        raise NotImplementedError


class ExpertLayer(Expert):
    """A block of the vision tower."""

    def _routing(self, *args: Any, **kwargs: Any) -> Routing:
        return scope.current(self).route(args[0] if args else kwargs["hidden_states"])


class ExpertProjector(Expert):
    """A projector: what comes before it has routed."""

    def _routing(self, *args: Any, **kwargs: Any) -> Routing:
        routing = scope.current(self).routing
        if routing is None:
            raise RuntimeError("mixpertize: the projector must run after the vision tower's blocks")
        return routing


def template_of(module: nn.Module, num_experts: int) -> nn.Module:
    """Return the plain module without values, having seen that it can have experts.

    Raises:
        ValueError: a leaf can't be cloned; ``module`` is not changed.
    """
    template = copy_of(module).to("meta")
    group_leaves(copy.deepcopy(template), num_experts, lambda module, names: None)
    return template


def give_experts(module: nn.Module, mixin: type, template: nn.Module, num_experts: int) -> None:
    """Turn ``module``, in place, into E copies of itself behind one routing."""
    group_leaves(module, num_experts, _loosen)
    module.mixpert_template = (template,)  # in a tuple, so that it is no submodule
    module.__class__ = subclass(type(module), mixin)
    module.mixpert_plan = PreNormPlan.of(module) or MlpPlan.of(module)


def share(module: nn.Module) -> None:
    """Let a plan run a block of the trunk in inference, where there is one for it."""
    plan = PreNormPlan.of(module)
    if plan is not None:
        module.mixpert_plan = plan
        module.__class__ = subclass(type(module), TrunkLayer)


def unshare(module: nn.Module) -> None:
    """Undo ``share``."""
    del module.mixpert_plan
    module.__class__ = plain_class(module)


def take_experts(module: nn.Module, expert: int) -> None:
    """Undo ``give_experts``, in place, keeping one expert's parameters."""
    (template,) = module.mixpert_template
    del module.mixpert_template, module.mixpert_plan
    for path, plain in list(template.named_modules()):
        owner = module.get_submodule(path)
        parameters = dict(owner.named_parameters(recurse=False))
        if not parameters:
            continue
        if type(owner) is not type(plain) and not isinstance(owner, Loose):  # a grouped leaf
            parent, _, name = path.rpartition(".")
            training = owner.training
            owner = copy.deepcopy(plain).train(training)
            setattr(module.get_submodule(parent), name, owner)
        for name, parameter in parameters.items():
            setattr(owner, name, _one(parameter, expert))
        if isinstance(owner, Loose):
            del owner.mixpert_loose
    for owner in module.modules():
        owner.__class__ = _unwrapped(type(owner))


def _one(parameter: Tensor, expert: int) -> nn.Parameter:
    kept = parameter[expert].detach().clone()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _loosen(module: nn.Module, names: list[str]) -> None:
    module.mixpert_loose = tuple(names)
    module.__class__ = subclass(type(module), Loose)


def _unwrapped(cls: type) -> type:
    while "mixpert_plain" in cls.__dict__:
        cls = cls.mixpert_plain
    return cls
