"""Mutants of MoME's ops: references, contracts and Triton kernels."""

from __future__ import annotations

from mutant import Mutant
from of_triton import TRITON

REFERENCE = "mixpert_kernels/backends/reference"
POOL, MIX = "tests/test_adaptive_pool.py", "tests/test_mix_streams.py"
POOL_EMULATED, MIX_EMULATED = (
    f"tests/compiled/{op}.py" for op in ("test_adaptive_pool", "test_mix_streams")
)

MUTANTS: list[Mutant] = [
    Mutant(
        "pool-bins-do-not-overlap",
        "a bin ends where the next begins",
        f"{TRITON}/adaptive_pool.py",
        "return first, tl.cdiv((i + 1) * cells, bins) - first",
        "return first, (i + 1) * cells // bins - first",
        f"{POOL} -k 'by_hand and triton'",
    ),
    Mutant(
        "pool-one-column-short",
        "a bin has at most cdiv(W, 16) columns",
        f"{TRITON}/adaptive_pool.py",
        "return tl.cdiv(cells, bins) + uneven.to(tl.int32)",
        "return tl.cdiv(cells, bins)",
        f"{POOL} -k 'accurate and triton and float32'",
    ),
    Mutant(
        "pool-height-for-width",
        "a row of the grid is as long as a column",
        f"{TRITON}/adaptive_pool.py",
        "at = begin + (h + r) * grid_width",
        "at = begin + (h + r) * grid_height",
        f"{POOL} -k 'accurate and triton and float32'",
    ),
    Mutant(
        "pool-backward-share-of-its-own",
        "a patch gets each bin's gradient by the number of bins it is in",
        f"{TRITON}/adaptive_pool.py",
        "_, in_columns = bin_of(j + (start + c), grid_width, WIDTH)",
        "in_columns = columns",
        f"{POOL} -k 'by_hand and triton'",
    ),
    Mutant(
        "pool-backward-past-the-image",
        "a block writes into the rows of the next image",
        f"{TRITON}/adaptive_pool.py",
        "mask=(t < count)[:, None] & (d < C))",
        "mask=(begin + t < tokens)[:, None] & (d < C))",
        f"{POOL_EMULATED} -k 'accurate and 73 and bfloat16 and 80'",
    ),
    Mutant(
        "pool-channels-past-the-last",
        "a slice reads the channels of the next row",
        f"{TRITON}/adaptive_pool.py",
        "mask = valid[:, None] if C % LANES == 0 else valid[:, None] & (d < C)",
        "mask = valid[:, None] & (d < LANES * ((C + LANES - 1) // LANES))",
        f"{POOL_EMULATED} -k 'accurate and 73 and bfloat16 and 80'",
    ),
    Mutant(
        "pool-32-bit-row",
        "a row's offset is computed in 32 bits",
        f"{TRITON}/_rows.py",
        "offset = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t",
        "offset = (b * stride_b + t * stride_t).to(tl.int64)",
        f"{POOL} -k 64_bits",
    ),
    Mutant(
        "pool-reference-in-half",
        "the reference sums in half precision",
        f"{REFERENCE}/adaptive_pool.py",
        "wide = rows.to(torch.promote_types(rows.dtype, torch.float32))",
        "wide = rows",
        f"{POOL} -k 'float32_sums'",
    ),
    Mutant(
        "mix-cls-weighted-row",
        "the mixed tokens begin where the class token is",
        f"{TRITON}/mix_streams.py",
        "tl.store(y + before + at, mixed",
        "tl.store(y + at, mixed",
        f"{MIX} -k 'by_hand and triton'",
    ),
    Mutant(
        "mix-largest-logit-not-taken-off",
        "exp overflows",
        f"{TRITON}/mix_streams.py",
        "        top = tl.maximum(top, logits[i])\n",
        "        top = top\n",
        f"{MIX} -k 'large_logits and triton'",
    ),
    Mutant(
        "mix-first-stream-twice",
        "all streams' products are the first one's",
        f"{TRITON}/mix_streams.py",
        "s = tl.load(streams[i] + at, mask=inside, other=0.0).to(tl.float32)",
        "s = tl.load(streams[0] + at, mask=inside, other=0.0).to(tl.float32)",
        f"{MIX} -k 'by_hand and triton'",
    ),
    Mutant(
        "mix-chunk-of-the-next-image",
        "the last chunk of an image goes on into the next one",
        f"{TRITON}/mix_streams.py",
        "        inside = f < numbers\n",
        "        inside = f < start + CHUNK\n",
        f"{MIX_EMULATED} -k 'accurate and 1160 and bfloat16 and 80'",
    ),
    Mutant(
        "mix-first-chunk-alone",
        "parts past the first are left out of the logits' gradient",
        f"{TRITON}/mix_streams.py",
        "mask = (c < chunks) & (i < N)[None, :]",
        "mask = (c < 1) & (i < N)[None, :]",
        f"{MIX_EMULATED} -k 'accurate and 1160 and bfloat16 and 80'",
    ),
    Mutant(
        "mix-softmax-not-differentiated",
        "the logits get the weights' gradient",
        f"{REFERENCE}/mix_streams.py",
        "(g * (dg - (g * dg).sum(1, keepdim=True)))",
        "(g * dg)",
        f"{MIX} -k 'by_hand and reference'",
    ),
    Mutant(
        "mix-dot-in-half",
        "the reference adds up products in half precision",
        f"{REFERENCE}/mix_streams.py",
        "wide = torch.promote_types(dy.dtype, torch.float32)",
        "wide = dy.dtype",
        f"{MIX} -k 'float32_sums'",
    ),
]
