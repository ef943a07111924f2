"""grouped_outer: the gradients of the experts' weights, all of them in one launch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import _configs, _launch
from ._operands import ALIGNMENT, WEIGHTS, aligned_pieces, cdiv, named, padded, strides


def grouped_outer(
    dz: Tensor,  # (B, T, N) or (R, N), N = sum of widths
    x: Tensor,  # (B, T, K) or (R, K)
    widths: list[int],
    order: Tensor,  # (B,) int32
    offsets: Tensor,  # (E + 1,) int32
    num_experts: int,
    dtype: torch.dtype,
    out: list[Tensor] | None = None,  # each (E, widths[i], K) float32
    accumulate: bool = False,
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
) -> list[Tensor]:  # each (E, widths[i], K)
    """dW_i[e] = sum over the tiles b of e of dz_i[b]^T x[b]; exact zeros for an expert without a tile.

    One launch for up to three weights. Sums are float32, over tiles in the order of ``order`` and tokens upwards.

    Args:
        dz: the gradients of all weights' products side by side.
        x: what the weights were multiplied with.
        widths: columns of ``dz`` that belong to each weight.
        order: the tiles expert by expert.
        offsets: where each expert begins in ``order``.
        num_experts: E.
        dtype: of the results, unless ``out`` is given.
        out: main gradients to write instead of new tensors; contiguous.
        accumulate: add to ``out`` instead of overwriting it: an expert without a tile keeps what it has.
    """
    if out is None:
        out = [x.new_empty(num_experts, width, x.shape[-1], dtype=dtype) for width in widths]
    assert all(o.is_contiguous() and o.dtype in (x.dtype, torch.float32) for o in out)
    assert not accumulate or all(o.dtype == torch.float32 for o in out)
    starts = [0, *itertools.accumulate(widths)]
    dz, depth, x = padded(dz), x.shape[-1], padded(x)
    by_expert = (order, offsets, cu_seqlens)
    if any(start * dz.element_size() % ALIGNMENT for start in starts[:-1]):
        # A weight's columns do not begin where they can be read: all of them as one weight, then apart.
        whole = x.new_empty(num_experts, starts[-1], depth, dtype=out[0].dtype)
        _launch_run(dz, x, [whole], *by_expert, False)
        for o, part in zip(out, whole.split(widths, 1), strict=True):
            o.add_(part) if accumulate else o.copy_(part)
    else:
        for first in range(0, len(widths), WEIGHTS):
            some = out[first : first + WEIGHTS]
            _launch_run(dz[..., starts[first] :], x, some, *by_expert, accumulate)
    return out


def _launch_run(dz, x, out, order, offsets, cu_seqlens, accumulate) -> None:
    num_experts, _, depth = out[0].shape
    widths = [o.shape[1] for o in out] + [0] * (WEIGHTS - len(out))

    def blocks_n(facts: dict[str, int]) -> int:
        return sum(cdiv(width, facts["block_n"]) for width in widths)

    def blocks(facts: dict[str, int]) -> int:
        return num_experts * blocks_n(facts) * cdiv(depth, facts["block_k"])

    name = f"grouped_outer_{_configs.SUFFIX[x.dtype]}"
    kernel = _configs.of_size(name, x.device, blocks)
    facts = _launch.kernels()[kernel].constants
    args = {
        "z": dz,
        "x": x,
        **named("out{}", out),
        "order": order,
        "offsets": offsets,
        "cu_seqlens": cu_seqlens,
        "tokens": x.shape[-2],
        **{f"width{i}": width for i, width in enumerate(widths)},
        "blocks_n": blocks_n(facts),
        "depth": depth,
        "main": out[0].dtype == torch.float32,
        "accumulate": accumulate,
        "aligned": aligned_pieces(depth, *out),
        **strides("stride_z{}", dz, "bt"),
        **strides("stride_x{}", x, "bt"),
    }
    _launch.launch(kernel, blocks(facts), args)
