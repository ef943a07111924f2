"""Mutants of grouped_adapter: its contract, its reference and its Triton kernels."""

from __future__ import annotations

from mutant import Mutant
from of_mome_ops import REFERENCE
from of_triton import TRITON

TESTS, EMULATED = "tests/test_grouped_adapter.py", "tests/compiled/test_grouped_adapter.py"
FORWARD, BACKWARD = f"{TRITON}/grouped_adapter.py", f"{TRITON}/_grouped_adapter_backward.py"
EQUALS = f"{TESTS} -k 'equals_all and triton and uniform'"
PACKED = f"{TESTS} -k 'equals_all and triton and packed'"

MUTANTS: list[Mutant] = [
    Mutant(
        "adapter-only-the-chosen-probability",
        "the router's gradient is the chosen adapter's alone",
        f"{REFERENCE}/grouped_adapter.py",
        "grads[6] = inners * scale.to(inners.dtype)",
        "grads[6] = inners * scale.to(inners.dtype) * (inners == chosen)",
        f"{TESTS} -k by_hand",
    ),
    Mutant(
        "adapter-probability-without-up-bias",
        "the inner product leaves the up-projection's bias out",
        f"{REFERENCE}/grouped_adapter.py",
        "(h.to(wide) * g.to(wide)).sum() + up_bias.to(wide) @ dy.to(wide).sum(0)",
        "(h.to(wide) * g.to(wide)).sum()",
        f"{TESTS} -k 'equals_all and reference'",
    ),
    Mutant(
        "adapter-zero-added-to-the-residual",
        "a negative zero of the residual becomes a positive one",
        f"{REFERENCE}/grouped_adapter.py",
        "torch.where(y == 0, residual, y + residual)",
        "y + residual",
        f"{TESTS} -k 'zero_up and reference'",
    ),
    Mutant(
        "adapter-kernel-zero-added-to-the-residual",
        "the same in the kernel",
        FORWARD,
        "o = tl.where(o == 0.0, residual, o + residual)",
        "o = o + residual",
        f"{TESTS} -k 'zero_up and triton and float16'",
    ),
    Mutant(
        "adapter-bias-unscaled",
        "the scale does not reach the up-projection's bias",
        FORWARD,
        "o = (o + up_bias[None, :].to(tl.float32)) * scale",
        "o = o * scale + up_bias[None, :].to(tl.float32)",
        EQUALS,
    ),
    Mutant(
        "adapter-last-columns-lost",
        "a program that has fewer columns than a span computes none of the last block",
        FORWARD,
        "for start in range(first_n, last_n, BLOCK_N):",
        "for start in range(first_n, last_n // BLOCK_N * BLOCK_N, BLOCK_N):",
        EQUALS,
    ),
    Mutant(
        "adapter-columns-of-the-first-program",
        "every program computes the same columns",
        FORWARD,
        "first_n = span * SPAN",
        "first_n = 0 * SPAN",
        f"{EMULATED} -k 'accurate and bfloat16 and 90'",
    ),
    Mutant(
        "adapter-column-past-the-last",
        "the last program reads and writes a column past the width",
        FORWARD,
        "inside = (m[:, None] < rows) & (n[None, :] < width)",
        "inside = (m[:, None] < rows) & (n[None, :] <= width)",
        f"{EMULATED} -k 'accurate and bfloat16 and 90'",
    ),
    Mutant(
        "adapter-hidden-of-every-program",
        "hidden numbers are stored at the place of another tile",
        FORWARD,
        "tl.store(hidden_ptr + before * H +",
        "tl.store(hidden_ptr + begin * H +",
        EQUALS,
    ),
    Mutant(
        "adapter-hidden-in-inference",
        "hidden numbers go to memory where nothing needs them",
        FORWARD,
        '"hidden_ptr": kept if for_backward else None,',
        '"hidden_ptr": x.new_empty((*x.shape[:-1], hidden)),',
        f"{EMULATED} -k 'one_launch and 90'",
    ),
    Mutant(
        "adapter-own-hidden-everywhere",
        "the chosen adapter's hidden numbers are taken for every adapter's",
        BACKWARD,
        "        adapter = k.to(tl.int64)\n        own = k == e",
        "        adapter = k.to(tl.int64)\n        own = k >= 0",
        EQUALS,
    ),
    Mutant(
        "adapter-gradient-of-another-adapter",
        "the last adapter's program stores the gradients of the hidden numbers too",
        BACKWARD,
        "tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside & own)",
        "tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside)",
        EQUALS,
    ),
    Mutant(
        "adapter-inner-of-another-chunk",
        "column sums are those of the tile before",
        BACKWARD,
        "at = (first_chunk + c).to(tl.int64) * D",
        "at = (first_chunk * 0 + c).to(tl.int64) * D",
        EQUALS,
    ),
    Mutant(
        "adapter-inner-blocks-of-packed-rows",
        "the first block of a packed tile is taken for that of the tile before",
        BACKWARD,
        "first, first_chunk = first_block(tile, begin, BLOCK), first_block(tile, begin, CHUNK)",
        "first, first_chunk = begin // BLOCK, first_block(tile, begin, CHUNK)",
        PACKED,
    ),
    Mutant(
        "adapter-probability-unscaled",
        "the router's gradient lacks the adapter's scale",
        BACKWARD,
        "tl.store(dprobabilities_ptr + tl.program_id(0), inner * scale)",
        "tl.store(dprobabilities_ptr + tl.program_id(0), inner)",
        EQUALS,
    ),
]
