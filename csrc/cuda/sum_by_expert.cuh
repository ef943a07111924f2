// out_i[e, c] = sum over b in order[offsets[e] : offsets[e + 1]], s of part[b, s, before_i + c]
// with c in [0, width_i), before_i = sum of width_j, j < i
//
// One block computes kColumns columns of one expert. Its rows (b, s) are one list, and warp r % kWarps adds row r of
// it, from the first on; the warps' sums are added in order. So the order of a sum depends on nothing but the expert's
// own tiles, and an expert without tiles has zeros. Grid: E * blocks, blocks = the sum of ceil(width_i / kColumns).
#pragma once

#include "kernel.cuh"
#include "schedule.cuh"
#include "side_by_side.cuh"
#include "types.cuh"

namespace mixpert {

template <typename T>
struct SumByExpertArgs {
#define FIELDS(FIELD)                                    \
  FIELD(const float*, part)   /* (B, S, C) */            \
  FIELD(T*, out0)             /* (E, width0) */          \
  FIELD(T*, out1)             /* (E, width1) */          \
  FIELD(T*, out2)             /* (E, width2) */          \
  FIELD(const int*, order)    /* (B,) */                 \
  FIELD(const int*, offsets)  /* (E + 1,) */             \
  FIELD(int, width0)                                     \
  FIELD(int, width1)                                     \
  FIELD(int, width2)                                     \
  FIELD(int, blocks)          /* of one expert */        \
  FIELD(int, chunks)          /* S */                    \
  FIELD(long long, stride_b)                             \
  FIELD(long long, stride_s)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

struct SumByExpertConfig {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kSharedBytes = 0;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kColumns = 32;
  static constexpr void constants(Facts& facts) { facts.constant("columns", kColumns); }
};

template <class Config, typename T>
__device__ void sum_by_expert_block(const SumByExpertArgs<T>& args) {
  __shared__ float sums[Config::kWarps][Config::kColumns];
  const int e = blockIdx.x / args.blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Columns at = columns_of(blockIdx.x % args.blocks, args.width0, args.width1, args.width2, Config::kColumns);
  const int c = at.first + lane;
  const int start = args.offsets[e], rows = (args.offsets[e + 1] - start) * args.chunks;
  float sum = 0.0f;
  if (c < at.width) {
    const float* column = args.part + at.before + c;
#pragma unroll 4
    for (int r = warp; r < rows; r += Config::kWarps) {
      const long long b = args.order[start + r / args.chunks];
      sum += column[b * args.stride_b + r % args.chunks * args.stride_s];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= at.width) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) total += sums[w][lane];
  pick(at.tensor, args.out0, args.out1, args.out2)[static_cast<long long>(e) * at.width + c] = from_float<T>(total);
}

}  // namespace mixpert
