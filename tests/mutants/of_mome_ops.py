"""Mutants of MoME's ops: references, contracts and Triton kernels."""

from __future__ import annotations

from mutant import Mutant
from of_triton import TRITON

REFERENCE, CPU = "mixpert_kernels/backends/reference", "mixpert_kernels/backends/cpu"
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
        "pool-cpu-image-turned",
        "the smaller tensor in between is pooled along the axis already pooled",
        f"{CPU}/adaptive_pool.py",
        "_pool(half, axes[1], pooled)",
        "_pool(half, axes[0], pooled)",
        f"{POOL} -k 'by_hand and cpu'",
    ),
    Mutant(
        "mix-cpu-sums-in-half",
        "streams are added up in half precision",
        f"{CPU}/mix_streams.py",
        "y = g.new_empty(",
        "y = streams[0].new_empty(",
        f"{MIX} -k 'sums_over_streams and cpu'",
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

DEFORM, DEFORM_EMULATED = "tests/test_deform_attn.py", "tests/compiled/test_deform_attn.py"
DEFORM_WIDE = f"{DEFORM_EMULATED} -k wide_image"
DEFORM_LOOP = f"{DEFORM} -k 'by_hand or loop_over_grid_sample and small and triton and fixed'"
DEFORM_ANY_ORDER = f"{DEFORM} -k 'loop_over_grid_sample and small and triton and any'"
DEFORM_MANY = f"{DEFORM_EMULATED} -k many_queries"

MUTANTS += [
    Mutant(
        "deform-half-a-patch-off",
        "pixels are counted from the middle of the first",
        f"{TRITON}/_deform_attn_points.py",
        "return whole, tl.fma(reference, extent, -whole) - 0.5",
        "return whole, tl.fma(reference, extent, -whole)",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-position-rounded",
        "what lies between a patch and the next has the digits that the image's width leaves",
        f"{TRITON}/_deform_attn_points.py",
        "return whole, tl.fma(reference, extent, -whole) - 0.5",
        "return whole, (reference * extent - 0.5) - whole",
        DEFORM_WIDE,
    ),
    Mutant(
        "deform-no-top",
        "the softmax of large logits overflows",
        f"{TRITON}/_deform_attn_points.py",
        "        top = tl.maximum(top, logits[k])\n",
        "        top = tl.minimum(top, logits[k])\n",
        f"{DEFORM} -k 'large_logits and triton'",
    ),
    Mutant(
        "deform-wraps-around",
        "the patch behind the last of a line is the next line's first",
        f"{TRITON}/_deform_attn_points.py",
        "return (at >= 0) & (at < size), part if SECOND else 1.0 - part",
        "return (at >= 0) & (at < size + SECOND), part if SECOND else 1.0 - part",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-image-of-the-first",
        "every image is read from the first one's rows",
        f"{TRITON}/_deform_attn_points.py",
        "tl.load(cu_seqlens_ptr + b)",
        "tl.load(cu_seqlens_ptr + 0 * b)",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-softmax-gradient-without-mean",
        "dlogits leaves out what the other points lose",
        f"{TRITON}/_deform_attn_backward.py",
        "(weights[k] * (dweights[k] - mean))",
        "(weights[k] * dweights[k])",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-offsets-sign",
        "the derivative along y has the sign of x's",
        f"{TRITON}/_deform_attn_backward.py",
        "by_y += (2 * (corner // 2) - 1) * weight_x * s",
        "by_y += (2 * (corner % 2) - 1) * weight_x * s",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-reference-without-extent",
        "the reference's gradient along y counts patches of a line",
        f"{TRITON}/_deform_attn_backward.py",
        "sum_y * height.to(tl.float32)",
        "sum_y * width.to(tl.float32)",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-last-image-not-added",
        "the reference's gradient leaves out the last image",
        f"{TRITON}/_deform_attn_backward.py",
        "    for _ in range(batch):\n",
        "    for _ in range(batch - 1):\n",
        DEFORM_LOOP,
    ),
    Mutant(
        "deform-atomics-without-weight",
        "each point adds the whole gradient to dvalue",
        f"{TRITON}/_deform_attn_value.py",
        "part = (weights[k] * (weight_x * weight_y))[:, :, None] * dy",
        "part = (weight_x * weight_y)[:, :, None] * dy",
        DEFORM_ANY_ORDER,
    ),
    Mutant(
        "deform-line-above-passed-over",
        "the fixed order passes over points in the line above a block of patches",
        f"{TRITON}/_deform_attn_value.py",
        "upper = first // width - 1",
        "upper = first // width",
        f"{DEFORM} -k 'between_two_blocks and triton'",
    ),
    Mutant(
        "deform-queries-of-one-block",
        "the fixed order reads the first block of queries alone",
        f"{TRITON}/_deform_attn_value.py",
        "for start in range(0, queries, QUERIES):",
        "for start in range(0, QUERIES, QUERIES):",
        DEFORM_MANY,
    ),
    Mutant(
        "deform-bag-of-its-neighbour",
        "on a CPU a row of a slice of all layers is another layer's",
        "mixpert_kernels/backends/cpu/deform_attn.py",
        "    step = value.stride(0) // d\n",
        "    step = heads\n",
        f"{DEFORM} -k 'slice and cpu'",
    ),
]
