"""Which dtype a CPU computes a dtype in."""

import torch


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of ``dtype``; "supported" in oneDNN may still mean emulated."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


NATIVE = {dtype: _multiplies(dtype) for dtype in (torch.bfloat16, torch.float16)}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype`` where the CPU multiplies it natively, else float32.

    oneDNN emulates bfloat16 and float16 products on a CPU without instructions for them, at a fraction of float32's
    speed. Products in float32 cost two conversions of the activations.
    """
    return dtype if NATIVE.get(dtype, True) else torch.float32
