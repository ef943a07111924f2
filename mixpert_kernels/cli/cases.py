"""One small call of each op: what ``mixpert check`` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels import Grids, Routing, ops

# Odd on purpose: no tile of any kernel fits, and expert 1 has nothing to do.
TILES, TOKENS, WIDTH, HIDDEN, EXPERTS = 3, 17, 72, 136, 4
EXPERT = (2, 0, 2)
IMAGE_OF_TILE, BASE_TILE = (0, 0, 1), (0, 2)
SIZES = ((3, 5), (1, 4))  # of images' grids

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """A call: shapes of its floating tensors, and the function that makes it."""

    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Tensors, str], Tensors]
    differentiable: bool = True


def _routing(like: Tensor) -> Routing:
    return Routing.forced(torch.tensor(EXPERT, device=like.device), EXPERTS)


def _adaptive_pool(t: Tensors, backend: str) -> Tensors:
    grids = Grids.of(SIZES, t["x"].device)
    return {"y": ops.adaptive_pool(t["x"], grids, height=4, width=3, backend=backend)}


def _deform_attn(t: Tensors, backend: str) -> Tensors:
    grids = Grids.of(SIZES, t["value"].device)
    return {"y": ops.deform_attn(*t.values(), grids, backend=backend)}


def _grouped_adapter(t: Tensors, backend: str) -> Tensors:
    x, residual, probabilities, *adapters = t.values()
    options = {"residual": residual, "probabilities": probabilities}
    return {"y": ops.grouped_adapter(x, *adapters, _routing(x), **options, backend=backend)}


def _grouped_layer_norm(t: Tensors, backend: str) -> Tensors:
    y = ops.grouped_layer_norm(
        t["x"], t["weight"], t["bias"], _routing(t["x"]), eps=1e-6, backend=backend
    )
    return {"y": y}


def _grouped_linear(t: Tensors, backend: str) -> Tensors:
    options = {"activation": "gelu_tanh", "residual": t["residual"], "scale": t["scale"]}
    y = ops.grouped_linear(
        t["x"], t["weight"], t["bias"], _routing(t["x"]), **options, backend=backend
    )
    return {"y": y}


def _grouped_mlp(t: Tensors, backend: str) -> Tensors:
    x, weight1, bias1, weight2, bias2 = t.values()
    y = ops.grouped_mlp(x, weight1, bias1, weight2, bias2, _routing(x), backend=backend)
    return {"y": y}


def _mix_streams(t: Tensors, backend: str) -> Tensors:
    logits, cls, *streams = t.values()
    return {"y": ops.mix_streams(logits, streams, cls, backend=backend)}


def _norm_grouped_linear(t: Tensors, backend: str) -> Tensors:
    x, *layers = t.values()
    return {"y": ops.norm_grouped_linear(x, *layers, _routing(x), backend=backend)}


def _images(like: Tensor) -> dict[str, Tensor]:
    images = {"image_of_tile": IMAGE_OF_TILE, "base_tile": BASE_TILE}
    return {name: torch.tensor(ids, device=like.device) for name, ids in images.items()}


def _route(t: Tensors, backend: str) -> Tensors:
    x, *router = t.values()
    router = ops.RouterWeights(*router)
    routing = ops.route(x, router, ops.Strategy("direct"), **_images(x), backend=backend)
    return {"scores": routing.scores, "expert": routing.expert}


def _route_grouped_linear(t: Tensors, backend: str) -> Tensors:
    x, gain, offset, score, shift, *layer = t.values()
    router = ops.RouterWeights(gain, offset, None, None, score, shift)
    y, routing = ops.route_grouped_linear(
        x, router, ops.Strategy("direct"), *layer, **_images(x), backend=backend
    )
    return {"y": y, "scores": routing.scores, "expert": routing.expert}


X, ROWS, COLUMNS = (TILES, TOKENS, WIDTH), (EXPERTS, WIDTH), (EXPERTS, HIDDEN)
WIDER, NARROWER = (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
CASES = {
    "adaptive_pool": Case({"x": (sum(h * w for h, w in SIZES), WIDTH)}, _adaptive_pool),
    "deform_attn": Case(
        {
            "value": (sum(h * w for h, w in SIZES), 2, 36),
            "offsets": (len(SIZES), 7, 2, 3, 2),
            "logits": (len(SIZES), 7, 2, 3),
            "reference": (7, 2),
        },
        _deform_attn,
    ),
    "grouped_adapter": Case(
        {
            "x": X,
            "residual": X,
            "probabilities": (TILES, EXPERTS),
            "weight_down": (EXPERTS, 20, WIDTH),
            "down_bias": (EXPERTS, 20),
            "weight_up": (EXPERTS, WIDTH, 20),
            "up_bias": ROWS,
            "scale": (EXPERTS,),
        },
        _grouped_adapter,
    ),
    "grouped_layer_norm": Case({"x": X, "weight": ROWS, "bias": ROWS}, _grouped_layer_norm),
    "grouped_linear": Case(
        {
            "x": X,
            "weight": WIDER,
            "bias": COLUMNS,
            "residual": (*X[:2], HIDDEN),
            "scale": COLUMNS,
        },
        _grouped_linear,
    ),
    "grouped_mlp": Case(
        {"x": X, "weight1": WIDER, "bias1": COLUMNS, "weight2": NARROWER, "bias2": ROWS},
        _grouped_mlp,
    ),
    "mix_streams": Case(
        {"logits": (TILES, 2), "cls": (TILES, WIDTH), "first": X, "second": X}, _mix_streams
    ),
    "norm_grouped_linear": Case(
        {"x": X, "norm_weight": ROWS, "norm_bias": ROWS, "weight": WIDER, "bias": COLUMNS},
        _norm_grouped_linear,
        differentiable=False,  # by the separate ops, which have cases of their own
    ),
    "route": Case(
        {
            "x": X,
            "norm_weight": ROWS[1:],
            "norm_bias": ROWS[1:],
            "hidden_weight": WIDER[1:],
            "hidden_bias": COLUMNS[1:],
            "weight": COLUMNS,
            "bias": (EXPERTS,),
        },
        _route,
    ),
    "route_grouped_linear": Case(
        {
            "x": X,
            "router.norm_weight": ROWS[1:],
            "router.norm_bias": ROWS[1:],
            "router.weight": ROWS,
            "router.bias": (EXPERTS,),
            "norm_weight": ROWS,
            "norm_bias": ROWS,
            "weight": WIDER,
            "bias": COLUMNS,
        },
        _route_grouped_linear,
        differentiable=False,
    ),
}


def draw(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Normal numbers in float64; weights at the scale of a fresh layer, so that sums stay around 1."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if name.split(".")[-1].startswith(("weight", "hidden_w")) else 1.0
        drawn[name] = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn


@torch.no_grad()
def forward(case: Case, tensors: Tensors, backend: str) -> Tensors:
    """What the call returns, by name."""
    return case.call(tensors, backend)


def backward(case: Case, tensors: Tensors, backend: str) -> Tensors:
    """The gradients of the call's first result with respect to all its tensors, by name."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = next(iter(case.call(leaves, backend).values()))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dy = (16 * dy).round() / 16  # the same numbers in every dtype
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.device, y.dtype))
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
