"""Mutants of grouped_linear on sm_90a: its ring of buffers, its descriptors, its host code."""

from __future__ import annotations

from mutant import Mutant

TESTS = "tests/compiled/test_cuda_grouped_linear_sm90a.py"
ODD = f"{TESTS} -k 'odd_sizes and bfloat16'"
PACKED = "tests/compiled/test_cuda_packed.py"
RING = f"{TESTS} -k few_thread_blocks"


def _mutant(name: str, what: str, old: str, new: str, tests: str = RING) -> Mutant:
    return Mutant(f"wgmma-{name}", what, "csrc/cuda/grouped_linear_sm90a.cuh", old, new, tests)


def _of_wrappers(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(f"wgmma-{name}", what, "csrc/cuda/hopper.cuh", old, new, ODD)


MUTANTS: list[Mutant] = [
    _mutant(
        "no-full-wait",
        "products do not wait for their operands",
        "    hopper::wait(full(ring.stage), ring.parity);\n",
        "",
    ),
    _mutant(
        "full-parity",
        "products wait for the round before",
        "hopper::wait(full(ring.stage), ring.parity);",
        "hopper::wait(full(ring.stage), ring.parity ^ 1);",
    ),
    _mutant(
        "no-empty-wait",
        "the producer fills buffers that are still read",
        "        hopper::wait(empty(ring.stage), ring.parity ^ 1);\n",
        "",
    ),
    _mutant(
        "no-empty-arrive",
        "buffers are not given back",
        "      if (hopper::elected()) hopper::arrive(left);\n",
        "",
    ),
    _mutant(
        "given-back-early",
        "a buffer is given back while its products run",
        "      hopper::wait_groups<1>();\n",
        "",
    ),
    _mutant(
        "no-last-wait",
        "accumulators are read while the last products run",
        "    hopper::wait_groups<0>();\n",
        "",
    ),
    _mutant(
        "no-turn",
        "the second consumer begins before its buffers' round has come",
        "      hopper::wait(turn(me), parity);\n",
        "",
    ),
    _mutant(
        "not-skipped",
        "a consumer takes the other's buffers for its own",
        "      ring.skip(steps);\n",
        "",
    ),
    _mutant(
        "half-the-bytes",
        "one of two operands is not waited for",
        "hopper::arrive_and_expect(full(ring.stage), Config::kStageBytes);",
        "hopper::arrive_and_expect(full(ring.stage), Config::kOperandBytes);",
    ),
    _mutant(
        "too-many-bytes",
        "more is waited for than comes",
        "hopper::arrive_and_expect(full(ring.stage), Config::kStageBytes);",
        "hopper::arrive_and_expect(full(ring.stage), Config::kStageBytes + 16);",
    ),
    _mutant(
        "kept-sum",
        "a block begins with the sum of the one before",
        "    issue(acc, ring, false);\n",
        "    issue(acc, ring, true);\n",
    ),
    _mutant(
        "registers",
        "the producer keeps registers that the consumers need",
        "kProducerRegisters = 24",
        "kProducerRegisters = 40",
        ODD,
    ),
    _mutant(
        "third-weight",
        "the third weight is taken for the second",
        "pick(at.weight, &args.w0, &args.w1, &args.w2)",
        "pick(at.weight, &args.w0, &args.w1, &args.w1)",
        ODD,
    ),
    _mutant(
        "swapped-expert",
        "the place in the order is taken for the tile",
        "args.expert[rows.tile]",
        "args.expert[place.row / ceil_div(args.tokens, Config::kBlockM)]",
        ODD,
    ),
    _mutant(
        "packed-box",
        "a block of packed rows is loaded from the start of all rows",
        "(args.cu_seqlens ? at.rows.first : 0)",
        "0",
        f"{PACKED} -k 'linear_is and wgmma and bfloat16'",
    ),
    _mutant(
        "packed-empty-blocks",
        "slots without rows are multiplied",
        "if (rows_at(place_of(block)).has_rows() && others-- == 0) break;",
        "if (others-- == 0) break;",
        f"{PACKED} -k slots",
    ),
    Mutant(
        "wgmma-packed-stores",
        "a block writes into the rows of the next tile",
        "csrc/cuda/grouped_linear_outputs.cuh",
        "rows.tokens - first_row,",
        "args.tokens - rows.first - first_row,",
        f"{PACKED} -k 'linear_is and wgmma and bfloat16'",
    ),
    _of_wrappers(
        "descriptor-stride",
        "groups of 8 rows are sought 512 bytes apart",
        "1u << 30 | kSwizzleAlign / kUnit",
        "1u << 30 | kSwizzleAlign / 2 / kUnit",
    ),
    _of_wrappers(
        "descriptor-swizzle",
        "operands are read in 64-byte swizzle",
        "1u << 30 | kSwizzleAlign / kUnit",
        "2u << 30 | kSwizzleAlign / kUnit",
    ),
    _of_wrappers(
        "no-fence",
        "registers are not handed to wgmma",
        'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");',
        "",
    ),
    Mutant(
        "wgmma-by-tokens",
        "which kernel serves depends on the batch",
        "mixpert_kernels/backends/cuda/grouped_linear.py",
        "wgmma = _wgmma.serves(",
        "wgmma = len(x) > 1 and _wgmma.serves(",
        f"{TESTS} -k same_alone",
    ),
]
