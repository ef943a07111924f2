"""Every op on packed rows: random problems, the op's call by name, and a loop over the images in plain PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from _served import skip_unless_served

from mixpert_kernels import Routing, ops
from mixpert_kernels.backends import BACKENDS

K, H, N, E = 24, 20, 16, 5
LENGTHS = (5, 0, 1, 70, 17, 0)
EXPERT = (2, 1, 2, 3, 0, 2)  # expert 1 has a tile without rows, expert 4 none
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "gain": (E, K), "offset": (E, K),
    "weight": (E, N, K), "bias": (E, N), "scale": (E, N),
    "weight1": (E, H, K), "bias1": (E, H), "weight2": (E, N, H), "bias2": (E, N),
    "norm_weight": (K,), "norm_bias": (K,), "hidden_weight": (H, K), "hidden_bias": (H,),
    "router_weight": (E, H), "router_bias": (E,),
}  # fmt: skip
ROUTER = ("norm_weight", "norm_bias", "hidden_weight", "hidden_bias", "router_weight", "router_bias")  # fmt: skip
NORM, LINEAR = ("gain", "offset"), ("weight", "bias")
NAMES = {
    "grouped_layer_norm": ("x", *NORM),
    "grouped_linear": ("x", *LINEAR, "residual", "scale"),
    "grouped_mlp": ("x", "weight1", "bias1", "weight2", "bias2", "residual", "scale"),
    "norm_grouped_linear": ("x", *NORM, *LINEAR),
    "route": ("x", *ROUTER),
    "route_grouped_linear": ("x", *ROUTER, *NORM, *LINEAR),
}
OPS = tuple(NAMES)
ROUTING = tuple(op for op in OPS if op.startswith("route"))
ROUTED = tuple(op for op in OPS if op not in ROUTING)
DIFFERENTIABLE = ("grouped_layer_norm", "grouped_linear", "grouped_mlp", "route")
FEATURES = ("x", "residual")
DIRECT = ops.Strategy("direct")
all_ops = pytest.mark.parametrize("op", OPS)
all_backends = pytest.mark.parametrize("backend", BACKENDS)


def resized(k, h, n):
    """SHAPES with other widths."""
    sizes = {K: k, H: h, N: n}
    return {name: tuple(sizes.get(size, size) for size in s) for name, s in SHAPES.items()}


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def problem(op, lengths=LENGTHS, dtype=torch.float64, seed=0, sizes=SHAPES):
    """Random tensors by name, of sum(lengths) rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    shapes = {"x": (rows, sizes["gain"][1]), "residual": (rows, sizes["weight"][1]), **sizes}
    drawn = {}
    for name in NAMES[op]:
        t = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        drawn[name] = (t * t.shape[-1] ** -0.5 if "weight" in name and t.ndim > 1 else t).to(dtype)
    images = torch.randn(len(lengths), drawn["x"].shape[1], generator=generator)  # they differ
    drawn["x"] += images.repeat_interleave(torch.tensor(lengths), 0).to(dtype)
    return drawn


def call(op, p, lengths=LENGTHS, expert=EXPERT, backend="auto", cu=None, activation="gelu"):
    """The op's results by name, on packed rows; on (B, T, D) where ``lengths`` is None."""
    if cu is None and lengths is not None:
        cu = bounds(lengths)
    experts = len(p["router_bias"] if op in ROUTING else p[NAMES[op][1]])
    given = {n: p.get(n) for n in ("residual", "scale")} | {"activation": activation}
    if op in ROUTING:
        router, options = ops.RouterWeights(*(p[n] for n in ROUTER)), {"cu_seqlens": cu}
        if op == "route":
            routing = ops.route(p["x"], router, DIRECT, backend=backend, **options)
            return {"scores": routing.scores, "ids": routing.ids}
        layer = (p["gain"], p["offset"], p["weight"], p["bias"])
        y, routing = ops.route_grouped_linear(
            p["x"], router, DIRECT, *layer, activation=activation, backend=backend, **options
        )
        return {"y": y, "scores": routing.scores, "ids": routing.ids}
    routing = expert
    if not isinstance(expert, Routing):
        routing = Routing.forced(torch.as_tensor(expert), experts, cu_seqlens=cu)
    positional = [p[n] for n in NAMES[op] if n not in ("residual", "scale")]
    if op == "grouped_layer_norm":
        given = {}
    elif op == "norm_grouped_linear":
        given = {"activation": activation}
    return {"y": getattr(ops, op)(*positional, routing, backend=backend, **given)}


def plain(op, p, lengths=LENGTHS, expert=EXPERT):
    """The same in plain PyTorch, an image at a time."""
    residuals = p["residual"].split(lengths) if "residual" in p else itertools.repeat(None)
    found = {}
    for b, (x, residual) in enumerate(zip(p["x"].split(lengths), residuals)):  # noqa: B905
        if op in ROUTING:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            params = [p[n].to(wide) for n in ROUTER]
            z = F.layer_norm(x.to(wide).mean(0), params[0].shape, *params[:2], 1e-5)
            scores = F.linear(F.gelu(F.linear(z, *params[2:4])), *params[4:]).softmax(-1)
            found.setdefault("scores", []).append(scores)
            e = int(scores.argmax()) if scores.isfinite().all() else 0
        else:
            e = expert[b]
        if "gain" in p:
            x = F.layer_norm(x, x.shape[-1:], p["gain"][e], p["offset"][e], 1e-5)
        if op == "grouped_mlp":
            x = F.gelu(F.linear(x, p["weight1"][e], p["bias1"][e]))
            x = F.linear(x, p["weight2"][e], p["bias2"][e])
        elif "weight" in p:
            x = F.gelu(F.linear(x, p["weight"][e], p["bias"][e]))
        x = x * p["scale"][e] if "scale" in p else x
        found.setdefault("y", []).append(x if residual is None else x + residual)
    results = {"y": torch.cat(found["y"])} if op != "route" else {}
    return results | ({"scores": torch.stack(found["scores"])} if op in ROUTING else {})


def draw_dys(results, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in results.items() if n != "ids"}


def everything(op, function, p, dtype=None, dys=None):
    """Results of inference and, where the op has a gradient of its own, of training; and gradients, by name."""
    p = {n: t.to(dtype or t.dtype).clone() for n, t in p.items()}
    inference = {f"{n} in inference": t for n, t in function(p).items() if n != "ids"}
    if op not in DIFFERENTIABLE:
        return inference
    p = {n: t.requires_grad_() for n, t in p.items()}
    results = {n: t for n, t in function(p).items() if n != "ids"}
    dys = dys or draw_dys(results)
    given = [dys[n].reshape(t.shape).to(t.dtype) for n, t in results.items()]
    grads = torch.autograd.grad(list(results.values()), list(p.values()), given)
    results = {n: t.detach() for n, t in results.items()}
    return results | inference | {f"d{n}": g for n, g in zip(p, grads, strict=True)}


@pytest.fixture(autouse=True)
def runs_here(request):
    case = getattr(request.node, "callspec", None)
    if case is not None and "backend" in case.params:
        dtype = case.params.get("dtype", torch.float32)
        skip_unless_served(case.params["op"], case.params["backend"], dtype)
