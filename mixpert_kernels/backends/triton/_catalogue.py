"""Every kernel with every config shipped for a chip, as the reference geometry launches it; needs no GPU.

No signature is written here: the host functions run on tensors without memory, and what they would launch is recorded.
The geometry is that of the model this serves: SigLIP-so400m, T = 729, D = 1152, I = 4304, projected to 3584.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _configs, _launch
from ._catalogue_mome import MOME, PIX2STRUCT, MomeGeometry, PixelGeometry
from ._compile import signature
from ._configs import Chip

# Multiprocessors of A100, A40, L40S, H100 and H200, B200, RTX 5090.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
CHIPS = {f"sm_{arch}": _configs.nvidia(arch, n) for arch, n in MULTIPROCESSORS.items()}
CHIPS["gfx942"] = Chip("gfx942", 0, _configs.AMD_SHARED_BYTES, 304)


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        call: which host call of the geometry made it.
        dtype: of the features.
        args: by name; tensors are on the device ``meta``.
        default: False for a config that only autotuning takes.
    """

    call: str
    dtype: str
    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: _launch.Config
    default: bool

    @property
    def kernel_name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def label(self) -> str:
        """The call, the dtype and the config, as the tables name them."""
        sizes = [v for k, v in self.args.items() if k.startswith(("BLOCK_", "ROWS", "LANES"))]
        words = [self.call, self.dtype, self.args.get("INPUT_PRECISION") or ""]
        words = words if self.dtype == "float32" else words[:2]
        words += ["x".join(map(str, sizes)), f"{self.config.num_warps}w{self.config.num_stages}s"]
        words += ["tma"] * bool(self.args.get("TMA"))
        words += ["persistent"] * bool(getattr(self.config, "programs_per_multiprocessor", 0))
        return " ".join(filter(None, words))


@dataclass
class Geometry:
    """Tensors without memory, of the sizes of the reference model."""

    dtype: torch.dtype = torch.bfloat16
    B: int = 8
    E: int = 4
    T: int = 729
    D: int = 1152
    I: int = 4304  # noqa: E741  as SigLIP's papers call it
    P: int = 3584
    device: torch.device = field(default_factory=lambda: torch.device("meta"))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None

    def tokens(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.new(self.B, self.T, width, dtype=dtype)

    def layer(self, width: int, depth: int, count: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """Weights (E, width, depth) and biases (E, width)."""
        weights = [self.new(self.E, width, depth) for _ in range(count)]
        return weights, [self.new(self.E, width) for _ in range(count)]

    @property
    def ids(self) -> tuple[Tensor | None, ...]:
        """expert, order, offsets, cu_seqlens."""
        sizes = (self.B, self.B, self.E + 1)
        return *(self.new(n, dtype=torch.int32) for n in sizes), self.cu_seqlens

    def router(self, hidden: int) -> list[Tensor | None]:
        last = hidden or self.D
        norm = [self.new(self.D), self.new(self.D)]
        inner = [self.new(hidden, self.D), self.new(hidden)] if hidden else [None, None]
        return [*norm, *inner, self.new(self.E, last), self.new(self.E)]


@dataclass
class PackedGeometry(Geometry):
    """Packed rows of a tower that takes images of any size: about Qwen2.5-VL's, T rows an image on average."""

    T: int = 1021
    D: int = 1280
    # Its own 3420 is no multiple of 16: such a layer loads number by number and spills, of packed rows or not.
    I: int = 3424  # noqa: E741

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.new(self.B + 1, dtype=torch.int32)

    def tokens(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.new(self.B * self.T, width, dtype=dtype)


def _linear(
    g: Geometry, width: int, depth: int, *, count=1, activation="none", residual=False, train=False
):
    from .grouped_linear import grouped_linear

    weights, biases = g.layer(width, depth, count)
    added = g.tokens(count * width) if residual else None
    grouped_linear(g.tokens(depth), weights, biases, *g.ids, activation, added, None, train)


def _linear_backward(
    g: Geometry, width: int, depth: int, *, count=1, activation="none", scaled=False
):
    from .grouped_linear import grouped_linear_backward

    weights, biases = g.layer(width, depth, count)
    dy, pre = g.tokens(count * width), g.new(0)
    if activation != "none" or scaled:
        pre = g.tokens(count * width)
    scale = g.new(g.E, count * width) if scaled else None
    needs = [
        True,
        count > 1,
        True,
        scaled,
    ]  # the MLP's backward has the weight gradients of one weight
    grouped_linear_backward(
        dy, g.tokens(depth), weights, biases, pre, *g.ids, activation, scale, needs
    )


def _mlp_backward(g: Geometry):
    from .grouped_mlp import grouped_mlp_backward

    (w1,), (b1,) = g.layer(g.I, g.D)
    (w2,), (b2,) = g.layer(g.D, g.I)
    pre, none = g.tokens(g.I), g.new(0)
    needs = [True] * 5 + [False]
    dy, x = g.tokens(g.D), g.tokens(g.D)
    grouped_mlp_backward(dy, x, w1, b1, w2, b2, pre, none, *g.ids, "gelu_tanh", None, needs)


def _norm(g: Geometry, width: int):
    from .grouped_layer_norm import grouped_layer_norm

    grouped_layer_norm(g.tokens(width), g.new(g.E, width), g.new(g.E, width), *g.ids, 1e-6)


def _norm_backward(g: Geometry, width: int):
    from .grouped_layer_norm import grouped_layer_norm_backward

    x, gain = g.tokens(width), g.new(g.E, width)
    mean = g.tokens(1, torch.float32)
    grouped_layer_norm_backward(x, x, gain, gain, mean, mean, *g.ids)


def _route(g: Geometry, hidden: int):
    from .route import route

    rule = (1e-6, "score_difference", 0.1, "runner_up")
    route(g.tokens(g.D), g.cu_seqlens, None, None, None, *g.router(hidden), *rule)


def _route_backward(g: Geometry, hidden: int):
    from .route import route_backward

    scores, pooled = (g.new(g.B, n, dtype=torch.float32) for n in (g.E, g.D))
    router = g.router(hidden)[:5]
    x = g.tokens(g.D)
    route_backward(scores, pooled, x, g.cu_seqlens, None, *router, scores, pooled, 1e-6, True)


def _routed_qkv(g: Geometry, hidden: int):
    from .route_grouped_linear import route_grouped_linear

    rule = (1e-6, "score_difference", 0.1, "runner_up")
    norm = (g.new(g.E, g.D), g.new(g.E, g.D), 1e-6)
    weights, biases = g.layer(g.D, g.D, 3)
    route_grouped_linear(
        g.tokens(g.D),
        None,
        None,
        None,
        None,
        *g.router(hidden),
        *rule,
        *norm,
        weights,
        biases,
        "none",
    )


FORWARD: dict[str, Callable[[Geometry], None]] = {
    "routed qkv": lambda g: _routed_qkv(g, 0),
    "norm": lambda g: _norm(g, g.D),
    "qkv": lambda g: _linear(g, g.D, g.D, count=3),
    "out": lambda g: _linear(g, g.D, g.D, residual=True),
    "fc1": lambda g: _linear(g, g.I, g.D, activation="gelu_tanh"),
    "fc2": lambda g: _linear(g, g.D, g.I, residual=True),
    "projector 1": lambda g: _linear(g, g.P, g.D, activation="gelu"),
    "projector 2": lambda g: _linear(g, g.P, g.P),
}
OTHERS: dict[str, Callable[[Geometry], None]] = {
    "route": lambda g: _route(g, 0),
    "route with a hidden layer": lambda g: _route(g, 256),
    "fc1 in training": lambda g: _linear(g, g.I, g.D, activation="gelu_tanh", train=True),
    "norm of 4304": lambda g: _norm(g, g.I),
    "qkv backward": lambda g: _linear_backward(g, g.D, g.D, count=3),
    "projector 1 backward": lambda g: _linear_backward(g, g.P, g.D, activation="gelu"),
    "scaled out backward": lambda g: _linear_backward(g, g.D, g.D, scaled=True),
    "mlp backward": _mlp_backward,
    "norm backward": lambda g: _norm_backward(g, g.D),
    "route backward": lambda g: _route_backward(g, 0),
    "route backward with a hidden layer": lambda g: _route_backward(g, 256),
}
PACKED: dict[str, Callable[[Geometry], None]] = {
    "packed norm": lambda g: _norm(g, g.D),
    "packed qkv": lambda g: _linear(g, g.D, g.D, count=3),
    "packed fc1": lambda g: _linear(g, g.I, g.D, activation="gelu_tanh", train=True),
    "packed fc2": lambda g: _linear(g, g.D, g.I, residual=True),
    "packed qkv backward": lambda g: _linear_backward(g, g.D, g.D, count=3),
    "packed mlp backward": _mlp_backward,
    "packed norm backward": lambda g: _norm_backward(g, g.D),
    "packed route": lambda g: _route(g, 0),
    "packed route backward": lambda g: _route_backward(g, 0),
}
# What float32 runs by: the widest and the deepest product, and what is not a product.
FLOAT32 = ("fc1", "fc2", "norm", "mlp backward", "norm backward", "route", "routed qkv")
# The expert segment forward, two layers and the projector; attention is PyTorch's, one launch more a layer.
LAYER = ("norm", "qkv", "out", "norm", "fc1", "fc2")
ROUTED_LAYER = ("routed qkv", "out", "norm", "fc1", "fc2")
SEGMENT = (*ROUTED_LAYER, *LAYER, "projector 1", "projector 2")


def launches(chip: Chip, every_config: bool = True) -> list[Launch]:
    """What the host functions launch on a chip; of launches that share one machine code, the first.

    Args:
        chip: one of ``CHIPS``.
        every_config: also with the configs that only autotuning takes.
    """
    found: dict[str, Launch] = {}
    calls = FORWARD | OTHERS
    for dtype, precision, names in (
        (torch.bfloat16, "highest", calls),
        (torch.float32, "high", FLOAT32),
        (torch.float32, "highest", FLOAT32),
    ):
        made = [
            (Geometry(dtype), {name: calls[name] for name in names}),
            (MomeGeometry(dtype), MOME),
            (PixelGeometry(dtype), PIX2STRUCT),
        ]
        for geometry, name, call in ((g, *item) for g, some in made for item in some.items()):
            for launch in record(chip, call, geometry, name, precision, every_config):
                code = (launch.kernel_name, signature(launch.kernel, launch.args), launch.config)
                found.setdefault(repr(code), launch)
    return list(found.values())


def packed_launches(chip: Chip, every_config: bool = False) -> list[Launch]:
    """What the host functions launch on a chip for packed rows, in bfloat16."""
    return [
        launch
        for name, call in PACKED.items()
        for launch in record(chip, call, PackedGeometry(), name, "highest", every_config)
    ]


def segment(chip: Chip, geometry: Geometry) -> list[Launch]:
    """What one forward pass of the expert segment launches, attention left out."""
    return [
        launch
        for name in SEGMENT
        for launch in record(chip, FORWARD[name], geometry, name, "highest", False)
    ]


def record(
    chip: Chip,
    call: Callable[[Any], None],
    geometry: Geometry | MomeGeometry,
    name: str,
    precision: str,
    every_config: bool,
) -> list[Launch]:
    """The launches of one call; a kernel's second and third launch are named ``.2`` and ``.3``."""
    found: list[Launch] = []
    dtype = str(geometry.dtype).removeprefix("torch.")
    default = True

    def launch(kernel, grid, args, config):
        found.append(Launch(name, dtype, kernel, grid, args, config, default))

    def fastest(key, rows, run):
        nonlocal default
        default = False
        for row in rows[1:] if every_config else []:
            run(row)
        default = True
        return rows[0]

    with _replaced(chip, launch, fastest), _float32_precision(precision):
        call(geometry)
    return _numbered(found)


def _numbered(found: list[Launch]) -> list[Launch]:
    seen: dict[tuple, int] = {}
    numbered = []
    for launch in sorted(found, key=lambda launch: not launch.default):
        key = (launch.kernel_name, launch.label)
        seen[key] = seen.get(key, 0) + 1
        call = launch.call if seen[key] == 1 else f"{launch.call} .{seen[key]}"
        numbered.append(dataclasses.replace(launch, call=call))
    return numbered


@contextlib.contextmanager
def _replaced(chip: Chip, launch: Callable, fastest: Callable) -> Iterator[None]:
    before = _launch.launch, _configs.chip, _configs.fastest
    _launch.launch, _configs.fastest = launch, fastest
    _configs.chip = lambda device: chip
    try:
        yield
    finally:
        _launch.launch, _configs.chip, _configs.fastest = before


@contextlib.contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
