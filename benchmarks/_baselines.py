"""What the expert segment is measured against, in plain PyTorch and transformers.

Trunk features ``x (B, T, D)`` and ``expert (B,) int64`` become ``(B, T, P)``. `naive_loop` and
`all_experts` run the transformers modules as they are; `strong_loop` and `stacked_segment` (with
`grouped_mm` or `gathered_bmm`) do the same arithmetic on weights stacked over the experts, Q, K and
V in one GEMM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _harness import DEVICE, DTYPE, Output, Unavailable
from _models import NUM_EXPERTS, PlainTower
from torch import Tensor, nn

from mixpert_kernels import backends


class Sorted(NamedTuple):
    """A batch in expert order."""

    order: Tensor  # (B,)
    inverse: Tensor  # (B,) puts tiles back
    counts: list[int]  # tiles of each expert, known to the host

    @classmethod
    def of(cls, expert: Tensor) -> Sorted:
        order = expert.argsort(stable=True)
        return cls(order, order.argsort(), expert.bincount(minlength=NUM_EXPERTS).tolist())


def per_group(experts: Sequence[Callable[..., Tensor]], expert: Tensor, *inputs: Tensor) -> Tensor:
    """Mask, gather, run, scatter: each expert on its own tiles, the results put back in place."""
    y = None
    for e, run in enumerate(experts):
        mask = expert == e
        if mask.any():
            part = run(*(t[mask] for t in inputs))
            y = part.new_empty(len(expert), *part.shape[1:]) if y is None else y
            y[mask] = part
    return y


def naive_loop(towers: Sequence[PlainTower], x: Tensor, expert: Tensor) -> Tensor:
    """`per_group` for each layer and the projector, as a first implementation would have it."""
    for stage in zip(*(tower.stages() for tower in towers), strict=True):
        x = per_group(stage, expert, x)
    return x


def sorted_slices(
    experts: Sequence[Callable[..., Tensor]], by_expert: Sorted, *inputs: Tensor
) -> Tensor:
    """Gather once in expert order, run each expert on its slice, scatter once."""
    slices = [t[by_expert.order].split(by_expert.counts) for t in inputs]
    parts = zip(*slices, strict=True)
    ys = [run(*part) for run, part in zip(experts, parts, strict=True) if len(part[0])]
    return torch.cat(ys)[by_expert.inverse]


def all_experts(
    experts: Sequence[Callable[..., Tensor]], expert: Tensor, *inputs: Tensor
) -> Tensor:
    """Run every expert on every tile, then select: no loop over data, E times the work."""
    every = torch.stack([run(*inputs) for run in experts])  # (E, B, T, P)
    return every[expert, torch.arange(len(expert), device=expert.device)]


class StackedWeights:
    """The experts' parameters with the expert as first dimension; Q, K and V side by side."""

    def __init__(self, towers: Sequence[PlainTower]) -> None:
        def stack(*modules_of: Callable[[PlainTower], nn.Module]) -> tuple[Tensor, Tensor]:
            def gather(leaf: str) -> Tensor:
                return torch.stack(
                    [torch.cat([getattr(of(t), leaf) for of in modules_of]) for t in towers]
                ).detach()

            return gather("weight"), gather("bias")

        def layer(i: int) -> dict[str, tuple[Tensor, Tensor]]:
            def at(path: str) -> Callable[[PlainTower], nn.Module]:
                return lambda t: t.layers[i].get_submodule(path)

            return {
                "ln1": stack(at("layer_norm1")),
                "qkv": stack(
                    at("self_attn.q_proj"), at("self_attn.k_proj"), at("self_attn.v_proj")
                ),
                "out": stack(at("self_attn.out_proj")),
                "ln2": stack(at("layer_norm2")),
                "fc1": stack(at("mlp.fc1")),
                "fc2": stack(at("mlp.fc2")),
            }

        self.layers = [layer(i) for i in range(len(towers[0].layers))]
        self.projector = [stack(lambda t: t.projector[0]), stack(lambda t: t.projector[2])]
        first = towers[0].layers[0]
        self.heads, self.eps = first.self_attn.num_heads, first.layer_norm1.eps

    def parameters(self) -> list[Tensor]:
        leaves = [leaf for layer in self.layers for leaf in layer.values()] + self.projector
        return [tensor for leaf in leaves for tensor in leaf]


def attention(qkv: Tensor, heads: int) -> Tensor:  # (B, T, 3D) -> (B, T, D)
    b, t, _ = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D / H)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)


def strong_loop(w: StackedWeights, x: Tensor, counts: Sequence[int]) -> Tensor:
    """Sorted tiles, ``counts[e]`` of each expert: a slice an expert, one attention call for all."""
    present = [e for e, count in enumerate(counts) if count]
    sizes = [counts[e] for e in present]
    xs = list(x.split(sizes))

    def linear(parts: Sequence[Tensor], leaf: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [
            F.linear(part, leaf[0][e], leaf[1][e]) for e, part in zip(present, parts, strict=True)
        ]

    def norm(parts: Sequence[Tensor], leaf: tuple[Tensor, Tensor]) -> list[Tensor]:
        weight, bias = leaf
        d = (weight.shape[-1],)
        return [
            F.layer_norm(part, d, weight[e], bias[e], w.eps)
            for e, part in zip(present, parts, strict=True)
        ]

    for leaves in w.layers:
        attended = attention(
            torch.cat(linear(norm(xs, leaves["ln1"]), leaves["qkv"])), w.heads
        ).split(sizes)
        xs = [a + b for a, b in zip(xs, linear(attended, leaves["out"]), strict=True)]
        inner = [
            F.gelu(h, approximate="tanh") for h in linear(norm(xs, leaves["ln2"]), leaves["fc1"])
        ]
        xs = [a + b for a, b in zip(xs, linear(inner, leaves["fc2"]), strict=True)]
    inner = [F.gelu(h) for h in linear(xs, w.projector[0])]
    return torch.cat(linear(inner, w.projector[1]))


def stacked_segment(
    w: StackedWeights, x: Tensor, expert: Tensor, linear: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The segment with ``linear(x, weight, bias)`` for the whole batch and all else eager."""

    def norm(h: Tensor, leaf: tuple[Tensor, Tensor]) -> Tensor:
        h = F.layer_norm(h, h.shape[-1:], eps=w.eps)
        return torch.addcmul(leaf[1][expert, None], h, leaf[0][expert, None])

    for leaves in w.layers:
        x = x + linear(
            attention(linear(norm(x, leaves["ln1"]), *leaves["qkv"]), w.heads), *leaves["out"]
        )
        inner = F.gelu(linear(norm(x, leaves["ln2"]), *leaves["fc1"]), approximate="tanh")
        x = x + linear(inner, *leaves["fc2"])
    return linear(F.gelu(linear(x, *w.projector[0])), *w.projector[1])


def gathered_bmm(expert: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A linear that copies each tile's expert weights side by side and runs one batched GEMM."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias[expert, None], x, weight[expert].transpose(1, 2))

    return linear


def grouped_mm(expert: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A linear on PyTorch's ``grouped_mm``, for sorted tiles. It has no bias: that one is eager."""
    call = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if call is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    tiles = expert.bincount(minlength=NUM_EXPERTS).cumsum(0)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        offsets = (tiles * x.shape[1]).to(torch.int32)
        y = call(x.flatten(0, 1), weight.transpose(1, 2), offs=offsets)
        return y.view(*x.shape[:2], -1) + bias[expert, None]

    return linear


def grouped_mm_reason() -> str | None:
    """Why `grouped_mm` cannot run here, or None. (It needs rows of 16-byte multiples: all have.)"""
    x, weight = (
        torch.ones(shape, device=DEVICE, dtype=DTYPE) for shape in ((2, 8, 16), (4, 8, 16))
    )
    try:
        grouped_mm(torch.tensor([0, 2], device=DEVICE))(
            x, weight, torch.zeros(4, 8, device=DEVICE, dtype=DTYPE)
        )
    except (Unavailable, RuntimeError, NotImplementedError) as reason:
        return str(reason).splitlines()[0]
    return None


def dense_gemm(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """One library GEMM with as many rows as all tiles have, and nothing else: what a GPU's grouped GEMM aims at.

    On a CPU it would tell no more than the plain GEMM that runs in every scenario.
    """
    if DEVICE.type != "cuda":
        raise Unavailable("for a GPU")
    rows = x.flatten(0, 1)
    return lambda: (rows @ weight.T).view(*x.shape[:2], -1)


def captured(call: Callable[[], Output]) -> Callable[[], Output]:
    """The call as a CUDA graph: all its launches for the price of one."""
    if DEVICE.type != "cuda":
        raise Unavailable("needs a CUDA device")
    from mixpert_kernels.hf.cuda_graph import CudaRecorder

    outputs, replay = CudaRecorder(DEVICE).record(call)

    def run() -> Output:
        replay()
        return outputs

    return run


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Within, ``auto`` takes this backend, and raises where it cannot run."""
    before, backends.BACKENDS = backends.BACKENDS, (backend,)
    try:
        yield
    finally:
        backends.BACKENDS = before


def compiled(function: Callable, *args: object, freeze: bool = False) -> Callable:
    """``torch.compile(function)``, compiled for `args` and nothing else.

    With `freeze`, inductor may also reorder the weights beforehand, as our CPU backend does.
    """
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()
    run = torch.compile(function, dynamic=False)
    try:
        with torch._inductor.config.patch(freezing=freeze):
            run(*args)
    except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as failure:
        raise Unavailable(f"torch.compile: {str(failure).splitlines()[0]}") from failure
    return run
