"""What is timed: one op at a layer's widths, by any backend, and as a plain loop over the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpert_kernels import Routing, ops

Tensors = dict[str, Tensor]
EPS = 1e-6
STRATEGY = ops.Strategy("direct")
GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


class Call(NamedTuple):
    """One op at one layer's widths.

    Attributes:
        op: its name.
        widths: as the op passes them to ``backends.pick``.
        parts: N of each weight of a linear layer whose weights are several, such as query, key and value.
        activation: of a linear layer.
        residual: whether one is added.
    """

    op: str
    widths: tuple[int, ...]
    parts: tuple[int, ...] = ()
    activation: str = "none"
    residual: bool = False

    @property
    def differentiable(self) -> bool:
        """Whether it has a backward of its own; the fused ops leave theirs to the ops they fuse."""
        return self.op not in ("norm_grouped_linear", "route_grouped_linear")

    def shapes(self, tiles: int, tokens: int, experts: int) -> dict[str, tuple[int, ...]]:
        """Of all tensors by name; ``x`` and ``residual`` are a batch, the others parameters."""
        depth, width = self.widths[0], self.widths[-1]
        shapes: dict[str, tuple[int, ...]] = {"x": (tiles, tokens, depth)}
        if self.op in ("route", "route_grouped_linear"):
            hidden = self.widths[1:-1] if self.op == "route" else ()
            shapes |= {"router.norm.weight": (depth,), "router.norm.bias": (depth,)}
            for h in hidden:
                shapes |= {"router.hidden.weight": (h, depth), "router.hidden.bias": (h,)}
            shapes |= {"router.weight": (experts, *(hidden or (depth,))), "router.bias": (experts,)}
        if self.op in ("grouped_layer_norm", "norm_grouped_linear", "route_grouped_linear"):
            shapes |= {"norm.weight": (experts, depth), "norm.bias": (experts, depth)}
        if self.op == "grouped_mlp":
            hidden = self.widths[1]
            shapes |= {"weight1": (experts, hidden, depth), "bias1": (experts, hidden)}
            shapes |= {"weight2": (experts, width, hidden), "bias2": (experts, width)}
        elif self.op.endswith("linear"):
            for i, n in enumerate(self.parts or (width,)):
                shapes |= {f"weight{i}": (experts, n, depth), f"bias{i}": (experts, n)}
        return shapes | ({"residual": (tiles, tokens, width)} if self.residual else {})

    def draw(
        self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
    ) -> Tensors:
        """Random tensors; weights at the scale of a fresh layer, and images that differ, so that routes are sure."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        drawn = {}
        for name, shape in shapes.items():
            t = random(*shape)
            if name == "x":
                t = t + random(shape[0], 1, shape[2])
            elif "norm" in name:
                t = 0.3 * t + float("weight" in name)
            elif "weight" in name:
                t = t * shape[-1] ** -0.5
            drawn[name] = t.to(dtype)
        return drawn

    def run(self, t: Tensors, routing: Routing, backend: str) -> Tensors:
        """What the op returns by a backend, by name; the first is what a gradient is taken of."""
        return _RUN[self.op](self, t, routing, backend)

    def loop(self, t: Tensors, tiles_of: Sequence[Tensor]) -> Tensors:
        """The same by plain PyTorch, one expert after the other; ``tiles_of``: the tiles of each, known beforehand."""
        if self.op == "route":
            return _eager_route(t)
        if self.op == "route_grouped_linear":  # what a loop over experts cannot know beforehand
            routed = _eager_route(t)
            chosen = routed["expert"].tolist()
            ids = [[b for b, e in enumerate(chosen) if e == k] for k in range(len(tiles_of))]
            tiles_of = [torch.tensor(tiles, device=t["x"].device) for tiles in ids]
            return {"y": self._loop(t, tiles_of)} | routed
        return {"y": self._loop(t, tiles_of)}

    def _loop(self, t: Tensors, tiles_of: Sequence[Tensor]) -> Tensor:
        found = [(e, tiles) for e, tiles in enumerate(tiles_of) if len(tiles)]
        y = torch.cat([self._of_expert(t, e, tiles) for e, tiles in found])
        return y[torch.cat([tiles for _, tiles in found]).argsort()]

    def _of_expert(self, t: Tensors, e: int, tiles: Tensor) -> Tensor:
        x = t["x"][tiles]
        if "norm.weight" in t:
            x = F.layer_norm(x, x.shape[-1:], t["norm.weight"][e], t["norm.bias"][e], EPS)
        if self.op == "grouped_mlp":
            x = _activate(F.linear(x, t["weight1"][e], t["bias1"][e]), self.activation)
            x = F.linear(x, t["weight2"][e], t["bias2"][e])
        elif self.op.endswith("linear"):
            weights, biases = _parts(t)
            layers = zip(weights, biases, strict=True)
            ys = [_activate(F.linear(x, w[e], b[e]), self.activation) for w, b in layers]
            x = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
        return x + t["residual"][tiles] if self.residual else x


def _parts(t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    weights = [tensor for name, tensor in t.items() if name.startswith("weight")]
    return weights, [tensor for name, tensor in t.items() if name.startswith("bias")]


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation in GELUS:
        return F.gelu(z, approximate=GELUS[activation])
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.relu(z) if activation == "relu" else z


def _router(t: Tensors) -> ops.RouterWeights:
    hidden = t.get("router.hidden.weight"), t.get("router.hidden.bias")
    norm = t["router.norm.weight"], t["router.norm.bias"]
    return ops.RouterWeights(*norm, *hidden, t["router.weight"], t["router.bias"])


def _eager_route(t: Tensors) -> Tensors:
    """All of route for the direct strategy, in few calls."""
    w = [None if p is None else p.float() for p in _router(t)]
    gain, offset, hidden, hidden_bias, weight, bias = w
    z = F.layer_norm(t["x"].mean(1, dtype=torch.float32), gain.shape, gain, offset, 1e-5)
    if hidden is not None:
        z = F.gelu(F.linear(z, hidden, hidden_bias))
    scores = F.linear(z, weight, bias).softmax(-1)
    ids, _order = scores.argmax(-1).sort(stable=True)
    torch.searchsorted(ids, torch.arange(len(bias) + 1, device=ids.device))
    return {"scores": scores, "expert": scores.argmax(-1).int()}


def _route(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    got = ops.route(t["x"], _router(t), STRATEGY, backend=backend)
    return {"scores": got.scores, "expert": got.expert}


def _grouped_layer_norm(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    given = (t["x"], t["norm.weight"], t["norm.bias"], routing)
    return {"y": ops.grouped_layer_norm(*given, eps=EPS, backend=backend)}


def _grouped_linear(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    options = {"activation": call.activation, "residual": t.get("residual"), "backend": backend}
    return {"y": ops.grouped_linear(t["x"], *_parts(t), routing, **options)}


def _grouped_mlp(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    layers = [t[name] for name in ("weight1", "bias1", "weight2", "bias2")]
    options = {"activation": call.activation, "residual": t.get("residual"), "backend": backend}
    return {"y": ops.grouped_mlp(t["x"], *layers, routing, **options)}


def _norm_grouped_linear(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    given = (t["x"], t["norm.weight"], t["norm.bias"], *_parts(t), routing)
    options = {"norm_eps": EPS, "activation": call.activation, "backend": backend}
    return {"y": ops.norm_grouped_linear(*given, **options)}


def _route_grouped_linear(call: Call, t: Tensors, routing: Routing, backend: str) -> Tensors:
    given = (t["x"], _router(t), STRATEGY, t["norm.weight"], t["norm.bias"], *_parts(t))
    options = {"norm_eps": EPS, "activation": call.activation, "backend": backend}
    y, got = ops.route_grouped_linear(*given, **options)
    return {"y": y, "scores": got.scores, "expert": got.expert}


_RUN: dict[str, Callable[[Call, Tensors, Routing, str], Tensors]] = {
    "grouped_layer_norm": _grouped_layer_norm,
    "grouped_linear": _grouped_linear,
    "grouped_mlp": _grouped_mlp,
    "norm_grouped_linear": _norm_grouped_linear,
    "route": _route,
    "route_grouped_linear": _route_grouped_linear,
}
OPS = tuple(_RUN)
