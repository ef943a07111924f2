"""mix_streams: several streams of features of one shape, mixed by a weight each image gives each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixpert_kernels.backends import pick

from ._checks import autocast_dtype, require, require_floating, require_shape
from ._library import register, register_gradient, register_no_second_gradient

MAX_STREAMS = 8  # a kernel has one argument for each


def mix_streams(
    logits: Tensor,  # (B, n)
    streams: Sequence[Tensor],  # n of (B, L, D)
    cls: Tensor | None,  # (B, D)
    *,
    backend: str = "auto",
) -> Tensor:  # (B, L + 1, D), or (B, L, D) without cls
    """Add up streams of features by the softmax of each image's logits; put the class token, unweighted, before them.

    ``y[b, 0] = cls[b]``, ``y[b, 1 + l] = sum_i softmax(logits[b])_i streams[i][b, l]``.

    Args:
        logits: (B, n) floating point, on the device of the streams.
        streams: 1 to 8 tensors (B, L, D) of one floating dtype and device.
        cls: (B, D) like the streams, or None: the result begins with the first mixed token.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, L + 1, D), or (B, L, D) without ``cls``, in the dtype of the streams (autocast's, under autocast); softmax
        and sums are computed in float32 (float64 beside float64 streams). Gradients come in each tensor's own dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output. Backward reads the streams once more and keeps nothing else but the logits. Never waits for
        the device.

    Example:
        >>> streams = [torch.zeros(1, 2, 1), torch.full((1, 2, 1), 8.0)]
        >>> mix_streams(torch.zeros(1, 2), streams, torch.ones(1, 1)).flatten()
        tensor([1., 4., 4.])

    Source: docs/math.md, mix_streams.
    """
    op = "mix_streams"
    require(not isinstance(streams, Tensor), op, "streams", "be a sequence of tensors", "a tensor")
    streams = list(streams)
    held = f"hold 1 to {MAX_STREAMS} tensors"
    require(1 <= len(streams) <= MAX_STREAMS, op, "streams", held, len(streams))
    require_floating(op, "logits", logits)
    require_floating(op, "streams[0]", streams[0])
    if (dtype := autocast_dtype(streams[0])) is not None:
        streams = [s.to(dtype) for s in streams]
        cls = None if cls is None else cls.to(dtype)
    require_shape(op, "streams[0]", streams[0], "B", "L", "D")
    for i, stream in enumerate(streams):
        require_shape(op, f"streams[{i}]", stream, *streams[0].shape)
        _require_like_streams(f"streams[{i}]", stream, streams[0])
    batch, _, width = streams[0].shape
    require_shape(op, "logits", logits, batch, len(streams))
    where = f"be on the device of the streams, {streams[0].device}"
    require(logits.device == streams[0].device, op, "logits", where, logits.device)
    if cls is not None:
        require_shape(op, "cls", cls, batch, width)
        _require_like_streams("cls", cls, streams[0])
    return torch.ops.mixpert.mix_streams(logits, streams, cls, backend)


def _require_like_streams(name: str, tensor: Tensor, first: Tensor) -> None:
    op, device, dtype = "mix_streams", first.device, first.dtype
    require(
        tensor.device == device,
        op,
        name,
        f"be on the device of the streams, {device}",
        tensor.device,
    )
    require(
        tensor.dtype == dtype, op, name, f"have the dtype of the streams, {dtype}", tensor.dtype
    )


def _pick(backend, streams):
    first = streams[0]
    widths = (len(streams), first.shape[-1])
    return pick("mix_streams", backend, widths=widths, device=first.device, dtype=first.dtype)


def _run(logits, streams, cls, backend):
    return _pick(backend, streams).mix_streams(logits, streams, cls)


def _fake(logits, streams, cls, backend):
    batch, tokens, width = streams[0].shape
    return streams[0].new_empty(batch, tokens + (cls is not None), width)


def _setup_context(ctx, inputs, output):
    logits, streams, cls, ctx.backend = inputs
    ctx.has_cls = cls is not None
    ctx.save_for_backward(logits, *streams)


def _backward(ctx, dy):
    logits, *streams = ctx.saved_tensors
    needs_logits, needs_streams, needs_cls = ctx.needs_input_grad[:3]
    needs_streams = needs_streams if isinstance(needs_streams, bool) else any(needs_streams)
    dlogits = dstreams = None
    if needs_logits or needs_streams:
        dlogits, dstreams = torch.ops.mixpert.mix_streams_backward(
            dy, logits, streams, ctx.has_cls, [needs_logits, needs_streams], ctx.backend
        )
    return (
        dlogits if needs_logits else None,
        dstreams if needs_streams else [None] * len(streams),
        dy[:, 0] if ctx.has_cls and needs_cls else None,
        None,
    )


def _run_backward(dy, logits, streams, has_cls, needs, backend):
    return _pick(backend, streams).mix_streams_backward(dy, logits, streams, has_cls, needs)


def _fake_backward(dy, logits, streams, has_cls, needs, backend):
    needs_logits, needs_streams = needs
    return (
        logits.new_empty(logits.shape) if needs_logits else logits.new_empty(0),
        [s.new_empty(s.shape) for s in streams] if needs_streams else [],
    )


register(
    "mix_streams(Tensor logits, Tensor[] streams, Tensor? cls, str backend) -> Tensor", _run, _fake
)
register(
    "mix_streams_backward(Tensor dy, Tensor logits, Tensor[] streams, bool has_cls, bool[] needs, str backend) "
    "-> (Tensor, Tensor[])",
    _run_backward,
    _fake_backward,
)
register_gradient("mix_streams", _backward, _setup_context)
register_no_second_gradient("mix_streams")
