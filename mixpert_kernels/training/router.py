"""The router's stage: cross-entropy on domain labels over frozen trunk features, cached once."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mixpert_kernels.modules import Router


def fit_router(
    tower: nn.Module,
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    *,
    steps: int = 300,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """Train the router to send each image to the expert of its domain.

    Full-batch AdamW on the cross-entropy of the router's logits; nothing else is trained or kept. The paper trains the
    router last, alone, on domain labels; the optimiser's settings here are ours.

    Args:
        tower: a FusedMixpertTower, or a vision-language model with experts (``mixpertize``).
        features: (N, D) float32, from ``tower.router_features(...)``, or ``router_features(model, ...)`` of
            ``mixpert_kernels.hf.mllm``.
        labels: (N,) integers, 0 <= label < E: the expert of each image's domain.
        steps: of the optimiser.
        lr: its learning rate.
        weight_decay: its weight decay.
        seed: of the weights the router starts from.
        progress: show a progress bar, where stderr is a terminal.

    Returns:
        Accuracy of the best expert on the training features, 0..1.

    Raises:
        ValueError: a model without a router, features of another width or not finite, labels that differ from them in
            number or are out of range.
    """
    trained = router_of("fit_router", tower)
    check_labels("fit_router", features, labels, trained)
    router = copy.deepcopy(trained).float().requires_grad_()  # float16 has no room for AdamW
    devices = [features.device] if features.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        router.reset_parameters()
    features = features.detach().float().clone()  # a plain tensor, also of inference mode's
    labels = labels.to(features.device, torch.int64)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in tqdm(range(steps), desc="router", disable=None if progress else True, leave=False):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            F.cross_entropy(router(features), labels).backward()
        optimizer.step()
    trained.load_state_dict(router.state_dict())
    with torch.no_grad():
        return float((trained(features).argmax(-1) == labels).float().mean())


def router_of(caller: str, model: nn.Module) -> Router:
    """The router of a FusedMixpertTower or of a mixpertized model, which may be inside another; ValueError if none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    routers = [m.mixpert_router for m in modules if "mixpert_router" in m._modules]
    router = routers[0] if len(routers) == 1 else getattr(model, "router", None)
    if not isinstance(router, Router):
        raise ValueError(
            f"{caller}: tower must be a FusedMixpertTower or a mixpertized model, got a plain {type(model).__name__}"
        )
    return router


def check_labels(caller: str, features: Tensor, labels: Tensor, router: Router) -> None:
    """Raise ValueError unless each of the features (N, D) is finite and has a label (N,) below E."""
    width, num_experts = router.norm.weight.shape[0], router.out.weight.shape[0]
    if features.ndim != 2 or not len(features) or features.shape[1] != width:
        raise ValueError(
            f"{caller}: features must have shape (N, {width}), got {tuple(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{caller}: features must be finite, got {features.sum()}")
    if not isinstance(labels, Tensor):
        raise ValueError(f"{caller}: labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{caller}: labels must be {len(features)} integers, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    wrong = labels[(labels < 0) | (labels >= num_experts)]
    if len(wrong):
        raise ValueError(f"{caller}: labels must lie in 0..{num_experts - 1}, got {int(wrong[0])}")
