"""deform_attn: each query reads its image at a few points of its own, and takes their weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.grids import Grids, require_grids

from ._checks import require, require_floating, require_shape
from ._library import register, register_gradient, register_no_second_gradient


def deform_attn(
    value: Tensor,  # (R, heads, d)
    offsets: Tensor,  # (B, Q, heads, points, 2)
    logits: Tensor,  # (B, Q, heads, points)
    reference: Tensor,  # (Q, 2)
    grids: Grids,
    *,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:  # (B, Q, heads * d)
    """Sample each image bilinearly at a few points a query and head, and add the samples by softmax weights.

    ``y[b, q, h] = sum_k softmax(logits[b, q, h])[k] * sample(value of image b and head h, at p)`` with
    ``p = reference[q] + offsets[b, q, h, k] / (W, H)`` in (x, y), 0 and 1 being the image's edges: the pixel is
    ``p * (W, H) - 0.5``, and what lies outside the image is 0 (``grid_sample`` with zero padding and
    ``align_corners=False``).

    Args:
        value: (R, heads, d) floating point, the packed rows of all images. May be a slice of a wider tensor.
        offsets: (B, Q, heads, points, 2) in patches, x first; floating point, float64 exactly where ``value`` is. One
            that is not finite gives nothing or NaN, as the backend has it.
        logits: (B, Q, heads, points), likewise.
        reference: (Q, 2), likewise: (x, y) of each query, the same for all images.
        grids: H, W and rows of each image.
        deterministic: add the gradient of ``value`` in a fixed order. Without it the GPU backends may add it by
            atomics, in any order. ``torch.use_deterministic_algorithms(True)`` asks for it too.
        backend: ``auto`` or a name of ``mixpert_kernels.backends.BACKENDS``.

    Returns:
        (B, Q, heads * d) in the dtype of ``value``, under autocast too. Positions, softmax and sums are in float32 or
        better, so an image's width costs no accuracy.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the grids do not fit the rows.
        RuntimeError: no backend can run the call.

    Cost:
        Memory: the output; in backward the gradients, and of ``value`` a copy in float32 unless deterministic. On a
        GPU one launch a batch, whatever the sizes of its images, and never a wait for the device.

    Example:
        >>> value = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1)  # an image of 1 x 2 patches, one of 1 x 1
        >>> grids = Grids.of([(1, 2), (1, 1)])
        >>> middle, no_offset = torch.tensor([[0.5, 0.5]]), torch.zeros(2, 1, 1, 1, 2)
        >>> deform_attn(value, no_offset, torch.zeros(2, 1, 1, 1), middle, grids).flatten()
        tensor([2., 5.])

    Source: docs/math.md, deform_attn.
    """
    op = "deform_attn"
    require_floating(op, "value", value)
    require_shape(op, "value", value, "R", "heads", "d")
    require_grids(op, grids, value, "value")
    require_shape(op, "logits", logits, grids.batch, "Q", value.shape[1], "points")
    require_shape(op, "offsets", offsets, *logits.shape, 2)
    require_shape(op, "reference", reference, logits.shape[1], 2)
    for name, tensor in (("offsets", offsets), ("logits", logits), ("reference", reference)):
        require_floating(op, name, tensor)
        where = f"be on the device of value, {value.device}"
        require(tensor.device == value.device, op, name, where, tensor.device)
        double = (value.dtype == torch.float64) == (tensor.dtype == torch.float64)
        require(double, op, name, f"be float64 exactly where value is {value.dtype}", tensor.dtype)
    return torch.ops.mixpert.deform_attn(
        value, offsets, logits, reference, *grids, deterministic, backend
    )


def _pick(backend, value, logits):
    widths = (*value.shape[1:], logits.shape[-1])
    return pick("deform_attn", backend, widths=widths, device=value.device, dtype=value.dtype)


def _run(value, offsets, logits, reference, sizes, cu_seqlens, _deterministic, backend):
    chosen = _pick(backend, value, logits)
    return chosen.deform_attn(value, offsets, logits, reference, sizes, cu_seqlens)


def _fake(value, offsets, logits, *_):
    return value.new_empty(*logits.shape[:2], value.shape[1] * value.shape[2])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.deterministic, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.mixpert.deform_attn_backward(
        dy, *ctx.saved_tensors, ctx.deterministic, needs, ctx.backend
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 4


def _run_backward(dy, value, offsets, logits, *rest):
    *rest, deterministic, needs, backend = rest
    fixed = deterministic or torch.are_deterministic_algorithms_enabled()
    chosen = _pick(backend, value, logits)
    return chosen.deform_attn_backward(dy, value, offsets, logits, *rest, fixed, needs)


def _fake_backward(dy, value, offsets, logits, reference, sizes, cu_seqlens, _fixed, needs, _name):
    tensors = (value, offsets, logits, reference)
    return tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs, strict=True)
    )


register(
    "deform_attn(Tensor value, Tensor offsets, Tensor logits, Tensor reference, Tensor sizes, Tensor cu_seqlens, "
    "bool deterministic, str backend) -> Tensor",
    _run,
    _fake,
)
register(
    "deform_attn_backward(Tensor dy, Tensor value, Tensor offsets, Tensor logits, Tensor reference, Tensor sizes, "
    "Tensor cu_seqlens, bool deterministic, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
register_gradient("deform_attn", _backward, _setup_context)
register_no_second_gradient("deform_attn")
