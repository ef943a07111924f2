"""Where the points of deform_attn lie and what they weigh: what its kernels share, so that all see the same patches."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_of(b, sizes_ptr, cu_seqlens_ptr):
    """Of image b: H, W, and its first row."""
    height = tl.load(sizes_ptr + 2 * b)
    width = tl.load(sizes_ptr + 2 * b + 1)
    return height, width, tl.load(cu_seqlens_ptr + b)


@triton.jit
def centre(reference_ptr, valid, size):
    """The pixel ``reference * size - 0.5`` as a whole number and the rest.

    The rest is rounded once and keeps its digits in an image of any width; whatever the compiler contracts, the product
    is only ever used to find the whole number.
    """
    reference = tl.load(reference_ptr, mask=valid, other=0.0).to(tl.float32)
    extent = size.to(tl.float32)
    whole = tl.floor(reference * extent)
    return whole, tl.fma(reference, extent, -whole) - 0.5


@triton.jit
def pixel(offset_ptr, valid, whole, rest, size):
    """(patch before the point, how far the point is beyond it) along one axis, with ``centre``'s whole and rest.

    Far outside, the patch is any that lies outside: the number stays small.
    """
    place = tl.load(offset_ptr, mask=valid, other=0.0).to(tl.float32) + rest
    low = tl.floor(place)
    before = tl.minimum(tl.maximum(whole + low, -2.0), size.to(tl.float32))
    return before.to(tl.int32), place - low


@triton.jit
def softmax(logits_ptr, valid, POINTS: tl.constexpr):
    """The weights of a query and head's points, as a tuple."""
    logits = ()
    for k in tl.static_range(POINTS):
        logits += (tl.load(logits_ptr + k, mask=valid, other=0.0).to(tl.float32),)
    top = logits[0]
    for k in tl.static_range(1, POINTS):
        top = tl.maximum(top, logits[k])
    total = tl.exp(logits[0] - top)
    raised = (total,)
    for k in tl.static_range(1, POINTS):
        one = tl.exp(logits[k] - top)
        raised += (one,)
        total += one
    weights = ()
    for k in tl.static_range(POINTS):
        weights += (raised[k] / total,)
    return weights


@triton.jit
def along(before, part, size, SECOND: tl.constexpr):
    """Of the patch before a point along an axis, or of the SECOND, behind it: is it in the image, and its weight."""
    at = before + SECOND
    return (at >= 0) & (at < size), part if SECOND else 1.0 - part
