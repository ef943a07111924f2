"""What the router of a mixpertized model scores, to train it on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mixpert_kernels.backends.reference.route import pool

from .blocks import ExpertLayer
from .mixpertize import owner_of
from .routes import record_routing
from .scope import pushed


@torch.no_grad()
def router_features(model: nn.Module, **inputs: Any) -> Tensor:  # (I, D) float32
    """Return the pooled trunk features of each image, which the router scores: cache them once to train it.

    The mean over the tokens of each image's base tile, at the input of the first block with experts. The language model
    does not run. With ``mixpert_kernels.training.fit_router`` this trains the router alone, on labels.

    Args:
        model: a mixpertized model.
        inputs: what the model is called with, at least ``pixel_values``, on its device and in its dtype. What
            ``get_image_features`` does not take is left out, so the processor's whole output will do; InternVL,
            Idefics3 and SmolVLM need ``input_ids`` among it.

    Returns:
        (I, D) float32, without a graph, in the order of the images; D is the vision tower's width.

    Raises:
        ValueError: the model has no experts, or the inputs hold no images.

    Cost:
        One call of the vision tower and the projector, all tiles of it.

    Example:
        >>> features = router_features(model, **inputs)  # doctest: +SKIP
        >>> fit_router(model, features, torch.tensor([1, 2, 3]))  # doctest: +SKIP
    """
    owner = owner_of("router_features", model)
    if inputs.get("pixel_values") is None:
        got = ", ".join(inputs) or "none"
        raise ValueError(f"router_features: inputs must hold pixel_values, got {got}")
    taken = inspect.signature(owner.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in taken}
    seen: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    first = next(module for module in owner.modules() if isinstance(module, ExpertLayer))
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with pushed("prompts", (owner, inputs.get("input_ids"))), record_routing(model) as records:
            owner.get_image_features(**given)
    finally:
        handle.remove()
    (x,), (record,) = seen, records
    base = record.images.base_tile
    if base is not None:  # the dead ones of a padded batch come last
        base = base[: len(record.expert)]
    return pool(x, record.routing.cu_seqlens, base).float()
