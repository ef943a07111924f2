"""Mutants of the Triton kernels and their host code."""

from __future__ import annotations

from mutant import Mutant

TRITON = "mixpert_kernels/backends/triton"
LINEAR = "tests/test_grouped_linear.py -k 'triton and accurate and float32 and gelu_tanh'"
SEQUENCE = "tests/test_grouped_linear.py -k 'triton and sequence'"
OUTER = "tests/test_triton_backward.py -k 'outer and not bitwise and not layout'"
OUTER_ALONE = "tests/test_triton_backward.py -k 'outer_of_an_expert'"
REDUCE = "tests/test_triton_backward.py -k 'activation_backward and float32 and gelu'"
SUMS = "tests/test_triton_backward.py -k sums_by_expert"
MLP = "tests/test_grouped_mlp.py -k 'triton and float32 and gelu_tanh'"
NORM = "tests/test_triton_layer_norm.py -k widths"
SCORES = "tests/test_triton_route.py -k 'scores_and_decisions or gradients'"
DECIDE = "tests/test_triton_route.py -k 'ties or every_number'"
SORT = "tests/test_triton_route.py -k the_sort"
FUSED = "tests/test_route_grouped_linear.py -k 'triton and (any_shape or forced)'"
TICKETS = "tests/compiled/test_tickets.py -k any_schedule"
ORDER = "tests/compiled/test_tickets.py -k order_of_memory"


def _mutant(name: str, what: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, what, f"{TRITON}/{file}", old, new, tests)


MUTANTS: list[Mutant] = [
    _mutant(
        "gemm-k-tail-dropped",
        "a last step of K that is not full is left out",
        "_gemm.py",
        "    for start in range(0, depth, BLOCK_K):\n        if EVEN_K:",
        "    for start in range(0, depth - BLOCK_K + 1, BLOCK_K):\n        if EVEN_K:",
        LINEAR,
    ),
    _mutant(
        "gemm-k-mask-off-by-one",
        "the last step of K reads one feature past the depth",
        "_gemm.py",
        "mask=in_rows & (k[None, :] < depth - start)",
        "mask=in_rows & (k[None, :] <= depth - start)",
        "tests/compiled/test_grouped_linear.py -k 'rows_off or odd_sizes'",
    ),
    _mutant(
        "gemm-wrong-weight-stride",
        "steps along the weight as if it were transposed",
        "_gemm.py",
        "w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk",
        "w_step = tl.full((), BLOCK_K, tl.int64) * stride_wn",
        LINEAR,
    ),
    _mutant(
        "gemm-swapped-expert",
        "the tile's number is taken for its expert",
        "grouped_linear.py",
        "b, e = begin.to(tl.int64), expert.to(tl.int64)",
        "b, e = begin.to(tl.int64), tile.to(tl.int64) % 2",
        LINEAR,
    ),
    _mutant(
        "gemm-order-taken-for-the-tile",
        "the position in the visiting order is taken for the tile, where the expert is looked up",
        "grouped_linear.py",
        "expert = tl.load(expert_ptr + tile)",
        "expert = tl.load(expert_ptr + row // tl.cdiv(tokens, BLOCK_M))",
        LINEAR,
    ),
    _mutant(
        "gemm-32-bit-tile",
        "the tile's offset is computed in 32 bits",
        "grouped_linear.py",
        "acc, x + b * stride_xb, pick",
        "acc, x + tile * stride_xb, pick",
        "tests/test_triton_grouped_linear.py -k 64_bit",
    ),
    _mutant(
        "gemm-second-weight-for-the-third",
        "of q, k and v, v reads k's weight",
        "_gemm.py",
        "chosen = third if i == 2 else chosen",
        "chosen = second if i == 2 else chosen",
        SEQUENCE,
    ),
    _mutant(
        "gemm-locate-rows",
        "the last group of row blocks is taken for a full one",
        "_gemm.py",
        "height = tl.minimum(row_blocks - first, GROUP)",
        "height = GROUP",
        LINEAR,
    ),
    _mutant(
        "epilogue-column-mask-off-by-one",
        "stores one column past the weight's",
        "_gemm.py",
        "inside = (m[:, None] < tokens) & (n[None, :] < columns)",
        "inside = (m[:, None] < tokens) & (n[None, :] <= columns)",
        "tests/compiled/test_grouped_linear.py -k odd_sizes",
    ),
    _mutant(
        "epilogue-row-mask-dropped",
        "stores the rows past the last token",
        "_gemm.py",
        "inside = (m[:, None] < tokens) & (n[None, :] < columns)",
        "inside = (m[:, None] >= 0) & (n[None, :] < columns)",
        "tests/compiled/test_grouped_linear.py -k odd_sizes",
    ),
    _mutant(
        "epilogue-scale-before-activation",
        "the residual is added before the LayerScale",
        "_gemm.py",
        "y *= scale[None, :].to(tl.float32)",
        "y += scale[None, :].to(tl.float32)",
        LINEAR,
    ),
    _mutant(
        "epilogue-bias-of-the-first-expert",
        "every expert gets the bias of expert 0",
        "_gemm.py",
        "bias_ptr + e * columns + n",
        "bias_ptr + n",
        LINEAR,
    ),
    _mutant(
        "gelu-tanh-constant",
        "the tanh approximation with two digits swapped",
        "_math.py",
        "return 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))",
        "return 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.047415 * z * z * z)))",
        LINEAR,
    ),
    _mutant(
        "dx-second-weight-dropped",
        "dX adds the first weight only",
        "_dx.py",
        "for i in range(NUM_WEIGHTS):",
        "for i in range(1):",
        SEQUENCE,
    ),
    _mutant(
        "dx-second-weight-dropped-tma",
        "dX through descriptors adds the first weight only",
        "_dx.py",
        "for i in tl.static_range(NUM_WEIGHTS):",
        "for i in tl.static_range(1):",
        "tests/test_triton_grouped_linear.py -k dx_is_as_accurate",
    ),
    _mutant(
        "dx-no-activation-gradient",
        "dX is not multiplied by the derivative of the activation below",
        "_dx.py",
        "dx = halves[i] * activate_grad(pre, ACTIVATION)",
        "dx = halves[i]",
        MLP,
    ),
    _mutant(
        "outer-token-tail-dropped",
        "the last tokens of a tile are left out of dW",
        "grouped_outer.py",
        "for first_t in range(0, rows, BLOCK_T):",
        "for first_t in range(0, rows - BLOCK_T + 1, BLOCK_T):",
        OUTER,
    ),
    _mutant(
        "outer-token-mask-off-by-one",
        "dW adds the first token of the next tile",
        "grouped_outer.py",
        "in_t = first_t + t < rows",
        "in_t = first_t + t <= rows",
        "tests/test_triton_backward.py -k 'nothing_outside'",
    ),
    _mutant(
        "outer-first-tile-skipped",
        "dW leaves out the first tile of each expert",
        "grouped_outer.py",
        "for i in range(tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)):",
        "for i in range(tl.load(offsets_ptr + e) + 1, tl.load(offsets_ptr + e + 1)):",
        OUTER,
    ),
    _mutant(
        "outer-batch-order",
        "dW reads tiles by position, not through the order",
        "grouped_outer.py",
        "rows_of_tile(tl.load(order_ptr + i), tokens, cu_seqlens_ptr)",
        "rows_of_tile(i, tokens, cu_seqlens_ptr)",
        OUTER_ALONE,
    ),
    _mutant(
        "outer-overwrites-main-gradient",
        "accumulation forgets what was there",
        "grouped_outer.py",
        "acc += tl.load(out_ptrs, mask=inside, other=0.0)",
        "acc += 0.0 * tl.load(out_ptrs, mask=inside, other=0.0)",
        "tests/test_triton_backward.py -k main_gradients",
    ),
    _mutant(
        "bias-chunk-rows-past-the-end",
        "the last chunk of a tile counts tokens of the next tile",
        "_reduce.py",
        "inside = (t < count)[:, None] & in_n[None, :]",
        "inside = (t < count + 1)[:, None] & in_n[None, :]",
        REDUCE,
    ),
    _mutant(
        "dscale-after-scaling",
        "the scale's gradient is taken of dy already scaled",
        "_reduce.py",
        "dscale += dz * activate(pre, ACTIVATION)",
        "dscale += dz * pre",
        REDUCE,
    ),
    _mutant(
        "sums-wrong-tile",
        "partial sums are read by position, not through the order",
        "_reduce.py",
        "b = tl.load(order_ptr + start + r // chunks, mask=r < rows, other=0).to(tl.int64)",
        "b = (start + r // chunks).to(tl.int64)",
        SUMS,
    ),
    _mutant(
        "norm-variance-with-padding",
        "columns past D count as 0 - mean in the variance",
        "_rows.py",
        "away = away if (i + 1) * LANES <= D else tl.where(d < D, away, 0.0)",
        "away = away",
        NORM,
    ),
    _mutant(
        "norm-gain-of-another-expert",
        "the gain's row is D - 1 wide",
        "_rows.py",
        "return tl.load(ptr + e * D + d, mask=d < D, other=0.0).to(tl.float32)",
        "return tl.load(ptr + e * (D - 1) + d, mask=d < D, other=0.0).to(tl.float32)",
        NORM,
    ),
    _mutant(
        "norm-backward-mean-dropped",
        "dx leaves out the mean of u",
        "_grouped_layer_norm_backward.py",
        "away = tl.fma((x[i] - mean) * rstd, -mean_uh, u - mean_u)",
        "away = tl.fma((x[i] - mean) * rstd, -mean_uh, u)",
        NORM,
    ),
    _mutant(
        "route-pool-rows-past-the-tile",
        "the last block pools a row past the last token",
        "_route.py",
        "mask = (t[:, None] < tokens) & (d[None, :] < D)\n            at",
        "mask = (t[:, None] <= tokens) & (d[None, :] < D)\n            at",
        SCORES,
    ),
    _mutant(
        "route-partial-dropped",
        "the last partial sum is left out",
        "_route.py",
        "mask = (s[:, None] < blocks) & (d[None, :] < D)",
        "mask = (s[:, None] < blocks - 1) & (d[None, :] < D)",
        SCORES,
    ),
    _mutant(
        "route-ties-to-the-last",
        "a tie goes to the highest index",
        "_route.py",
        "best = tl.min(tl.where(inside & (scores == top), e, BLOCK_E), axis=0)",
        "best = tl.max(tl.where(inside & (scores == top), e, -1), axis=0)",
        DECIDE,
    ),
    _mutant(
        "route-threshold-exclusive",
        "a score equal to the threshold falls back",
        "_route.py",
        "wins = finite & (top >= threshold)",
        "wins = finite & (top > threshold)",
        DECIDE,
    ),
    _mutant(
        "route-not-finite-wins",
        "an image whose scores are not finite keeps its best expert",
        "_route.py",
        "wins = finite\n    if",
        "wins = tl.full((), True, tl.int1)\n    if",
        DECIDE,
    ),
    _mutant(
        "route-unstable-sort",
        "the rank of a tile within its block starts at one",
        "_route.py",
        "rank = tl.cumsum(mine, axis=0) - 1",
        "rank = tl.cumsum(mine, axis=0)",
        SORT,
    ),
    _mutant(
        "tickets-rows-not-waited-for",
        "a product starts when one block of its rows is normalised",
        "route_grouped_linear.py",
        "_wait(ready_ptr + row, tl.cdiv(tl.minimum(tokens - first_m, BLOCK_M), NORM_ROWS), TRAP)",
        "_wait(ready_ptr + row, 1, TRAP)",
        TICKETS,
    ),
    _mutant(
        "tickets-acquire-dropped",
        "a waiting program polls without acquire",
        "route_grouped_linear.py",
        'value = tl.atomic_add(ptr, 0, sem="acquire", scope="gpu")',
        'value = tl.atomic_add(ptr, 0, sem="relaxed", scope="gpu")',
        ORDER,
    ),
    _mutant(
        "tickets-barrier-dropped",
        "normalised rows are released by one warp for all",
        "route_grouped_linear.py",
        """        tl.debug_barrier()
        tl.atomic_add(
            ready_ptr""",
        """        tl.atomic_add(
            ready_ptr""",
        ORDER,
    ),
    _mutant(
        "tickets-swapped-kinds",
        "a product does not wait for its image's expert but takes expert 0",
        "route_grouped_linear.py",
        "e = (_wait(ids_ptr + image, 1, TRAP) - 1).to(tl.int64)\n    i = column",
        "e = (_wait(ids_ptr + image, 1, TRAP) * 0).to(tl.int64)\n    i = column",
        FUSED,
    ),
]
