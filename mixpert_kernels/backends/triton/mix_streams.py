"""mix_streams: a program mixes adjacent numbers of one image; backward adds up chunks, then these in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs_mome, _launch

STREAMS = range(8)  # arguments of a kernel: as many as the op takes


@triton.jit
def image_weights(logits_ptr, b, N: tl.constexpr):
    """softmax(logits[b]): N numbers in float32."""
    logits = ()
    for i in tl.static_range(N):
        logits += (tl.load(logits_ptr + b * N + i).to(tl.float32),)
    top = logits[0]
    for i in tl.static_range(1, N):
        top = tl.maximum(top, logits[i])
    total = 0.0
    for i in tl.static_range(N):
        total += tl.exp(logits[i] - top)
    weights = ()
    for i in tl.static_range(N):
        weights += (tl.div_rn(tl.exp(logits[i] - top), total),)
    return weights


@triton.jit(do_not_specialize=["tokens"])
def _mix_streams_kernel(
    y_ptr,  # (B, L + 1, D), or (B, L, D)
    logits_ptr,  # (B, N)
    cls_ptr,  # (B, D) or None
    s0_ptr,  # (B, L, D)
    s1_ptr,  # (B, L, D) or None; so are those that follow
    s2_ptr,
    s3_ptr,
    s4_ptr,
    s5_ptr,
    s6_ptr,
    s7_ptr,
    tokens,  # L
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # y[b, 0] = cls[b],  y[b, 1 + l, d] = sum_i g[b, i] s_i[b, l, d]     with g[b] = softmax(logits[b])
    #
    # One program computes BLOCK of the L * D numbers of an image, side by side, or copies BLOCK of its D of cls.
    # Grid: B * (cdiv(D, BLOCK) with cls + cdiv(L * D, BLOCK)). All streams' loads are in flight at once.
    streams = (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr, s6_ptr, s7_ptr)
    before: tl.constexpr = 0 if cls_ptr is None else D  # numbers
    first: tl.constexpr = (before + BLOCK - 1) // BLOCK  # blocks
    numbers = tokens * D
    blocks = first + tl.cdiv(numbers, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    y = y_ptr + b * (numbers + before)
    if cls_ptr is not None:
        d = block * BLOCK + tl.arange(0, BLOCK)  # D and more from block ``first`` on
        tl.store(y + d, tl.load(cls_ptr + b * D + d, mask=d < D), mask=d < D)
    if block >= first:
        at = (block - first) * BLOCK + tl.arange(0, BLOCK)
        weights = image_weights(logits_ptr, b, N)
        mixed = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(N):
            s = tl.load(streams[i] + b * numbers + at, mask=at < numbers, other=0.0)
            mixed = tl.fma(s.to(tl.float32), weights[i] + tl.zeros_like(mixed), mixed)
        tl.store(y + before + at, mixed.to(y_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit
def _add_products(sums, dy, streams, at, inside, N: tl.constexpr):
    """sums[i] + dy s_i, number by number."""
    new = ()
    for i in tl.static_range(N):
        s = tl.load(streams[i] + at, mask=inside, other=0.0).to(tl.float32)
        new += (tl.fma(dy, s, sums[i]),)
    return new


@triton.jit(do_not_specialize=["tokens"])
def _mix_streams_backward_kernel(
    dy_ptr,  # (B, L + 1, D), or (B, L, D)
    logits_ptr,  # (B, N)
    parts_ptr,  # (B, chunks, N) float32 or None
    s0_ptr,  # (B, L, D); of all of these, None from N on, and all where parts is
    s1_ptr,
    s2_ptr,
    s3_ptr,
    s4_ptr,
    s5_ptr,
    s6_ptr,
    s7_ptr,
    d0_ptr,  # (B, L, D), the streams' gradients; None from N on, and all where no stream needs one
    d1_ptr,
    d2_ptr,
    d3_ptr,
    d4_ptr,
    d5_ptr,
    d6_ptr,
    d7_ptr,
    tokens,  # L
    BEFORE: tl.constexpr,  # numbers of cls: D or 0
    D: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # d_i[b] = g[b, i] dy[b],  parts[b, c, i] = sum of dy[b] s_i[b] over chunk c of its L * D numbers
    #
    # One program takes one chunk and reads each of its numbers once. Grid: B * cdiv(L * D, CHUNK).
    streams = (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr, s6_ptr, s7_ptr)
    grads = (d0_ptr, d1_ptr, d2_ptr, d3_ptr, d4_ptr, d5_ptr, d6_ptr, d7_ptr)
    numbers = tokens * D
    chunks = tl.cdiv(numbers, CHUNK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(0) % chunks * CHUNK
    weights = image_weights(logits_ptr, b, N)
    sums = ()
    for _ in tl.static_range(N):
        sums += (tl.zeros((BLOCK,), tl.float32),)
    for first in range(start, tl.minimum(start + CHUNK, numbers), BLOCK):
        f = first + tl.arange(0, BLOCK)
        inside = f < numbers
        at = b * numbers + f
        dy = tl.load(dy_ptr + b * BEFORE + BEFORE + at, mask=inside, other=0.0).to(tl.float32)
        if parts_ptr is not None:
            sums = _add_products(sums, dy, streams, at, inside, N)
        if d0_ptr is not None:
            for i in tl.static_range(N):
                tl.store(grads[i] + at, (weights[i] * dy).to(d0_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        for i in tl.static_range(N):
            part = parts_ptr + tl.program_id(0).to(tl.int64) * N + i
            tl.store(part, tl.sum(sums[i], 0))


@triton.jit(do_not_specialize=["chunks"])
def _mix_streams_logits_kernel(
    parts_ptr,  # (B, chunks, N) float32
    logits_ptr,  # (B, N)
    dlogits_ptr,  # (B, N)
    chunks,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # dg[b] = sum_c parts[b, c],  dlogits[b] = g[b] (dg[b] - <g[b], dg[b]>)
    #
    # One program adds up the parts of one image, PARTS at a time. Grid: B.
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    parts = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, chunks, PARTS):
        c = first + tl.arange(0, PARTS)[:, None]
        mask = (c < chunks) & (i < N)[None, :]
        parts += tl.load(parts_ptr + (b * chunks + c) * N + i[None, :], mask=mask, other=0.0)
    dg = tl.sum(parts, 0)
    logits = tl.load(logits_ptr + b * N + i, mask=i < N, other=float("-inf")).to(tl.float32)
    g = tl.exp(logits - tl.max(logits, 0))
    g = tl.div_rn(g, tl.sum(g, 0) + tl.zeros_like(g))
    dlogits = g * (dg - tl.sum(g * dg, 0))
    tl.store(dlogits_ptr + b * N + i, dlogits.to(dlogits_ptr.dtype.element_ty), mask=i < N)


def mix_streams(
    logits: Tensor,  # (B, n)
    streams: list[Tensor],  # n of (B, L, D)
    cls: Tensor | None,  # (B, D)
) -> Tensor:  # (B, L + 1, D), or (B, L, D)
    batch, tokens, width = streams[0].shape
    y = streams[0].new_empty(batch, tokens + (cls is not None), width)
    block = _configs_mome.mix(y.element_size())
    args = {"y_ptr": y, "logits_ptr": logits.contiguous()}
    args |= {"cls_ptr": None if cls is None else cls.contiguous(), **_numbered("s", streams)}
    args |= {"tokens": tokens, "D": width, "N": len(streams), "BLOCK": block.BLOCK}
    blocks = triton.cdiv(tokens * width, block.BLOCK)
    if cls is not None:
        blocks += triton.cdiv(width, block.BLOCK)
    _launch.launch(_mix_streams_kernel, (batch * blocks,), args, block)
    return y


def mix_streams_backward(
    dy: Tensor,  # as y
    logits: Tensor,
    streams: list[Tensor],
    has_cls: bool,
    needs: list[bool],  # of logits, streams
) -> tuple[Tensor, list[Tensor]]:  # (B, n), n of (B, L, D); empty where not needed
    needs_logits, needs_streams = needs
    (batch, tokens, width), count = streams[0].shape, len(streams)
    block = _configs_mome.mix(dy.element_size(), backward=True)
    chunks = triton.cdiv(tokens * width, block.CHUNK)
    logits, dlogits, parts = logits.contiguous(), logits.new_empty(0), None
    if needs_logits:
        parts = logits.new_empty(batch, chunks, count, dtype=torch.float32)
    dstreams = [s.new_empty(s.shape) for s in streams] if needs_streams else []
    args = {"dy_ptr": dy.contiguous(), "logits_ptr": logits, "parts_ptr": parts}
    args |= _numbered("s", streams if needs_logits else []) | _numbered("d", dstreams)
    args |= {"tokens": tokens, "BEFORE": width * has_cls, "D": width, "N": count}
    args |= {"CHUNK": block.CHUNK, "BLOCK": block.BLOCK}
    _launch.launch(_mix_streams_backward_kernel, (batch * chunks,), args, block)
    if needs_logits:
        dlogits = logits.new_empty(logits.shape)
        rows = _configs_mome.MIX_LOGITS
        args = {"parts_ptr": parts, "logits_ptr": logits, "dlogits_ptr": dlogits, "chunks": chunks}
        args |= {"N": count, "WIDTH": triton.next_power_of_2(count), "PARTS": rows.PARTS}
        _launch.launch(_mix_streams_logits_kernel, (batch,), args, rows)
    return dlogits, dstreams


def _numbered(letter: str, tensors: list[Tensor]) -> dict[str, Tensor | None]:
    """The kernel's arguments of these names."""
    given = dict(enumerate(t.contiguous() for t in tensors))
    return {f"{letter}{i}_ptr": given.get(i) for i in STREAMS}
