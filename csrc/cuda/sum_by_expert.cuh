// out_i[e, c] = sum over b in order[offsets[e] : offsets[e + 1]], s of part[b, s, before_i + c]
// with c in [0, width_i), before_i = sum of width_j, j < i
//
// One block computes kColumns columns of one expert. Its rows (b, s) are one list, and warp r % kWarps adds row r of
// it, from the first on; the warps' sums are added in order. So the order of a sum depends on nothing but the expert's
// own tiles, and an expert without tiles has zeros. Grid: E * blocks, blocks = the sum of ceil(width_i / kColumns).
//
// Of packed rows part is (slots, C): a tile has ceil(its rows / chunk) of them, from its first slot on (packed.cuh).
// Its expert's list holds just these.
#pragma once

#include "kernel.cuh"
#include "packed.cuh"
#include "schedule.cuh"
#include "side_by_side.cuh"
#include "types.cuh"

namespace mixpert {

template <typename T>
struct SumByExpertArgs {
#define FIELDS(FIELD)                                    \
  FIELD(const float*, part)   /* (B, S, C), (slots, C) */ \
  FIELD(T*, out0)             /* (E, width0) */          \
  FIELD(T*, out1)             /* (E, width1) */          \
  FIELD(T*, out2)             /* (E, width2) */          \
  FIELD(const int*, order)    /* (B,) */                 \
  FIELD(const int*, offsets)  /* (E + 1,) */             \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) or null */  \
  FIELD(int, width0)                                     \
  FIELD(int, width1)                                     \
  FIELD(int, width2)                                     \
  FIELD(int, blocks)          /* of one expert */        \
  FIELD(int, chunks)          /* S */                    \
  FIELD(int, chunk)           /* rows, where packed */   \
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

// The sum of this warp's rows of the list where rows are packed: every kWarps-th from the warp-th on. Each lane finds
// how many rows one of 32 tiles has. Whose row a number is, is how many of the tiles end at it or before.
template <class Config, class Args>
__device__ __forceinline__ float sum_packed(const Args& args, const int* order, int tiles, const float* column,
                                            bool inside) {
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  int next = threadIdx.x / 32;
  for (int i = 0; i < tiles; i += 32) {
    int end = 0, slot = 0;
    if (i + lane < tiles) {
      const int tile = order[i + lane], first = args.cu_seqlens[tile];
      end = ceil_div(args.cu_seqlens[tile + 1] - first, args.chunk);
      slot = first / args.chunk + tile + end;
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int before = __shfl_up_sync(~0u, end, lanes);
      if (lane >= lanes) end += before;
    }
    slot -= end;
    const int rows = __shfl_sync(~0u, end, 31);
#pragma unroll 4
    for (; next < rows; next += Config::kWarps) {
      const int owner = __popc(__ballot_sync(~0u, end <= next));
      const int row = next + __shfl_sync(~0u, slot, owner);
      if (inside) sum += column[row * args.stride_s];
    }
    next -= rows;
  }
  return sum;
}

template <class Config, typename T>
__device__ void sum_by_expert_block(const SumByExpertArgs<T>& args) {
  __shared__ float sums[Config::kWarps][Config::kColumns];
  const int e = blockIdx.x / args.blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Columns at = columns_of(blockIdx.x % args.blocks, args.width0, args.width1, args.width2, Config::kColumns);
  const int c = at.first + lane;
  const int start = args.offsets[e], rows = (args.offsets[e + 1] - start) * args.chunks;
  float sum = 0.0f;
  const float* column = args.part + at.before + c;
  if (args.cu_seqlens) {
    sum = sum_packed<Config>(args, args.order + start, args.offsets[e + 1] - start, column, c < at.width);
  } else if (c < at.width) {
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
