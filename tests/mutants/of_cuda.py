"""Mutants of csrc/cuda and of its host code; those of wgmma's own loop are in of_wgmma.py."""

from __future__ import annotations

from mutant import Mutant

CSRC, HOST = "csrc/cuda", "mixpert_kernels/backends/cuda"
EMULATED = "tests/compiled/test_cuda_"
LINEAR = f"{EMULATED}grouped_linear.py -k 'odd_sizes and bfloat16'"
SCHEDULES = f"{EMULATED}grouped_linear.py -k every_schedule"
EPILOGUES = f"{EMULATED}grouped_linear.py -k 'epilogues and gelu_tanh'"
FAR = f"{EMULATED}inputs.py -k 'offsets and linear and not route and not norm'"
LAYOUT = f"{EMULATED}inputs.py -k one_off-grouped_linear"
TICKETS = f"{EMULATED}tickets.py -k 'any_schedule and norm'"
ORDER = f"{EMULATED}tickets.py -k 'order_of_memory and norm and bf16 and 80'"
ORDER_90A = f"{EMULATED}tickets_sm90a.py -k fence"
TICKETS_90A = f"{EMULATED}tickets_sm90a.py -k 'bit_for_bit and buffers'"
NORM = f"{EMULATED}grouped_layer_norm.py -k 'accurate and 80-5-1152-dtype8'"
RULES = f"{EMULATED}route.py -k every_rule"
OUTER = f"{EMULATED}grouped_outer.py -k batch_order"
SUMS = f"{EMULATED}grouped_linear_backward.py -k sums_take"
DX = f"{EMULATED}grouped_linear_backward.py -k weights_that_are_read"
PATH = "tests/test_cuda_path.py -k one_image"
PACKED = f"{EMULATED}packed.py"
PACKED_90A = f"{PACKED} -k 'linear_is and wgmma and bfloat16'"
INPUTS = "tests/test_cuda_inputs.py"


def _kernel(name: str, what: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(f"cuda-{name}", what, f"{CSRC}/{file}", old, new, tests)


def _host(name: str, what: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(f"cuda-{name}", what, f"{HOST}/{file}", old, new, tests)


MUTANTS: list[Mutant] = [
    _kernel(
        "k-tail-of-other-rows",
        "what lies past K is copied instead of zeros",
        "tile.cuh",
        "copy_async(to, from, chunk * Tile::kNumbers < left);",
        "copy_async(to, from);",
        LINEAR,
    ),
    _kernel(
        "tile-not-awaited",
        "the next tile is read before it has landed",
        "mainloop.cuh",
        "            copy_wait<kStages - 2>();\n",
        "            copy_wait<kStages - 1>();\n",
        SCHEDULES,
    ),
    _kernel(
        "no-barrier",
        "a buffer is filled while warps read it",
        "mainloop.cuh",
        "            __syncthreads();\n          }\n          load_a",
        "          }\n          load_a",
        SCHEDULES,
    ),
    _kernel(
        "row-too-many",
        "one row past the tile's tokens is written",
        "epilogue.cuh",
        "inside[i] = first_row + row < out_.rows;",
        "inside[i] = first_row + row <= out_.rows;",
        LINEAR,
    ),
    _kernel(
        "scale-of-another-column",
        "all columns of a vector take the first one's scale",
        "epilogue.cuh",
        "__fmul_rn(z[i], scale_[i % kSize])",
        "__fmul_rn(z[i], scale_[0])",
        EPILOGUES,
    ),
    _kernel(
        "expert-of-the-place",
        "the position in the visiting order is taken for the tile, where the expert is looked up",
        "grouped_linear.cuh",
        "args.expert[at.tile]",
        "args.expert[place.row / ceil_div(args.tokens, Loop::kBlockM)]",
        LINEAR,
    ),
    _kernel(
        "32-bit-expert",
        "an expert's offset is computed in 32 bits",
        "grouped_linear.cuh",
        "+ expert * args.stride_we +",
        "+ static_cast<int>(expert * args.stride_we) +",
        FAR,
    ),
    _kernel(
        "rows-announced-early",
        "a block says that its rows are there before all of its warps have written them",
        "tickets.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) add_release",
        "  if (threadIdx.x == 0) add_release",
        ORDER,
    ),
    _kernel(
        "rows-not-awaited",
        "a product does not wait for its rows",
        "tickets.cuh",
        "  if (threadIdx.x == 0) wait_for(args.ready + place.row, ceil_div(rows, kNormRows));\n",
        "",
        TICKETS,
    ),
    _kernel(
        "wgmma-ticket-buffer",
        "a buffer is filled while wgmma reads it",
        "mainloop_sm90a.cuh",
        "      hopper::wait_groups<1>();  // the tile before the last one has been read\n",
        "",
        TICKETS_90A,
    ),
    _kernel(
        "wgmma-ticket-proxy",
        "wgmma reads what cp.async wrote without a fence between their proxies",
        "mainloop_sm90a.cuh",
        "      fence_copies();\n",
        "",
        ORDER_90A,
    ),
    _kernel(
        "unbiased-variance",
        "the variance is divided by D - 1",
        "rows.cuh",
        "__fadd_rn(mean_of(squares, width), eps)",
        "__fadd_rn(mean_of(squares, width - 1), eps)",
        NORM,
    ),
    _kernel(
        "tie-to-the-last",
        "of equal scores the last wins",
        "route.cuh",
        "other.expert < expert)",
        "other.expert > expert)",
        RULES,
    ),
    _kernel(
        "outer-same-tile-again",
        "an expert's first tile is added for each of its tiles",
        "grouped_outer.cuh",
        "next_ = *++order_;",
        "next_ = *order_;",
        OUTER,
    ),
    _kernel(
        "sums-of-all-tiles",
        "every expert sums from the first tile of all on",
        "sum_by_expert.cuh",
        "args.order[start + r / args.chunks]",
        "args.order[r / args.chunks]",
        SUMS,
    ),
    _kernel(
        "dx-first-weight-again",
        "dX multiplies by the weight before",
        "grouped_linear_backward.cuh",
        "pick(next_, args_.w0, args_.w1, args_.w2)",
        "pick(next_ - 1, args_.w0, args_.w1, args_.w2)",
        DX,
    ),
    _kernel(
        "packed-slot-search",
        "a tile's first slot is taken for the tile before",
        "packed.cuh",
        "if (begin(middle) <= place) low = middle;",
        "if (begin(middle) < place) low = middle;",
        PACKED_90A,
    ),
    _kernel(
        "packed-slots-of-tiles-before",
        "a tile's slots begin where its rows do, without one more for each tile before",
        "packed.cuh",
        "/ kSize) + tile;",
        "/ kSize);",
        PACKED_90A,
    ),
    _kernel(
        "packed-stores-past-the-tile",
        "a block writes into the rows of the next tile",
        "grouped_linear.cuh",
        "                       rows.tokens - first_row,\n",
        "                       args.tokens - rows.first - first_row,\n",
        f"{PACKED} -k 'linear_is and small and float16'",
    ),
    _kernel(
        "packed-dx-past-the-tile",
        "dX is written into the rows of the next tile",
        "grouped_linear_backward.cuh",
        "const int tokens = at.tokens - token,",
        "const int tokens = args.tokens - at.first - token,",
        f"{PACKED} -k 'linear_backward and float16'",
    ),
    _kernel(
        "packed-outer-of-neighbours",
        "a tile's last step adds rows of the next tile",
        "grouped_outer.cuh",
        "    left_ = rows.tokens;\n",
        "    left_ = min(ceil_div(rows.tokens, Loop::kDepth) * Loop::kDepth, args_.tokens - rows.first);\n",
        f"{PACKED} -k 'linear_backward and float16'",
    ),
    _kernel(
        "packed-sum-of-unwritten",
        "an expert's sums take a tile's slot that no row is in",
        "sum_by_expert.cuh",
        "end = ceil_div(args.cu_seqlens[tile + 1] - first, args.chunk);",
        "end = args.cu_seqlens[tile + 1] / args.chunk - first / args.chunk + 1;",
        f"{PACKED} -k more_tiles_than",
    ),
    _kernel(
        "packed-pool-of-neighbours",
        "a mean takes rows of the next tile",
        "route.cuh",
        "const int rows = min(tokens - first_row, kPoolRows);",
        "const int rows = kPoolRows;",
        f"{PACKED} -k 'test_route and 64-24'",
    ),
    _kernel(
        "packed-pool-of-none",
        "nobody arrives for a tile without rows",
        "route.cuh",
        "if (at.first_row >= max(at.tokens, 1)) return;",
        "if (!at.has_rows()) return;",
        f"{PACKED} -k 'test_route and 64-24'",
    ),
    _host(
        "packed-slots-too-few",
        "as many slots as if tiles began at whole blocks",
        "_operands.py",
        "self.tokens // size + self.batch,",
        "cdiv(self.tokens, size),",
        f"{PACKED} -k linear_backward",
    ),
    _host(
        "packed-in-one-launch",
        "packed rows reach the launch that draws tickets",
        "norm_grouped_linear.py",
        "if packed or not (",
        "if not (",
        f"{PACKED} -k gives_way",
    ),
    _host(
        "one-launch-never",
        "below one wave the LayerNorm still takes a launch",
        "norm_grouped_linear.py",
        "return _tickets.waves(x, weights) < 1",
        "return _tickets.waves(x, weights) < 0",
        PATH,
    ),
    _host(
        "misaligned-rows",
        "rows that do not begin at multiples of 16 bytes reach cp.async",
        "_operands.py",
        "if width % numbers == 0 and aligned(tensor):",
        "if width % numbers == 0 and tensor.stride(-1) == 1:",
        LAYOUT,
    ),
    _host(
        "negative-grid",
        "a grid below 1 goes to CUDA",
        "_launch.py",
        "if not 0 < grid <= MAX_GRID:",
        "if not grid <= MAX_GRID:",
        f"{INPUTS} -k a_grid",
    ),
    Mutant(
        "cuda-routing-apart",
        "a routing whose numbers lie apart reaches a kernel",
        "mixpert_kernels/ops/_checks.py",
        "            and tensor.is_contiguous()\n",
        "",
        f"{INPUTS} -k routing_that_is_not",
    ),
]
