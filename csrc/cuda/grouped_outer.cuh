// out_i[e, n, k] = sum over b in order[offsets[e] : offsets[e + 1]], t of z[b, t, before_i + n] * x[b, t, k]
// with n in [0, width_i), before_i = sum of width_j, j < i
//
// One block computes kBlockM of n x kBlockN of k of one expert, all of its sum in a fixed order: no atomics, so an
// expert's gradient is bit for bit what its own tiles alone give, and an expert without tiles stores zeros.
// Grid: E * blocks_n * ceil(K / kBlockN), blocks_n = the sum of ceil(width_i / kBlockM).
//
// The tokens of a tile are summed from its first one on, kDepth at a time, and what lies past its last one is copied as
// zeros: packed rows give an expert the bits of its own tiles, wherever they lie.
#pragma once

#include "kernel.cuh"
#include "loops.cuh"
#include "packed.cuh"
#include "pieces.cuh"
#include "schedule.cuh"
#include "side_by_side.cuh"
#include "types.cuh"

namespace mixpert {

template <typename T>
struct GroupedOuterArgs {
#define FIELDS(FIELD)                                                            \
  FIELD(const T*, z)          /* (B, T, N), N = width0 + width1 + width2 */      \
  FIELD(const T*, x)          /* (B, T, K); both or neither packed rows */       \
  FIELD(void*, out0)          /* (E, width0, K), float where `main`, else T */   \
  FIELD(void*, out1)          /* (E, width1, K) */                               \
  FIELD(void*, out2)          /* (E, width2, K) */                               \
  FIELD(const int*, order)    /* (B,) */                                         \
  FIELD(const int*, offsets)  /* (E + 1,) */                                     \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */         \
  FIELD(int, tokens)                                                             \
  FIELD(int, width0)                                                             \
  FIELD(int, width1)                                                             \
  FIELD(int, width2)                                                             \
  FIELD(int, blocks_n)                                                           \
  FIELD(int, depth)           /* K */                                            \
  FIELD(int, main)            /* whether out is a main gradient, in float32 */   \
  FIELD(int, accumulate)      /* whether to add to it */                         \
  FIELD(int, aligned)         /* whether all pieces of out are */                \
  FIELD(long long, stride_zb)                                                    \
  FIELD(long long, stride_zt)                                                    \
  FIELD(long long, stride_xb)                                                    \
  FIELD(long long, stride_xt)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

// The source of the sum: the tokens of one tile of the expert after the other, without a pause of the pipeline between.
template <class Loop>
class TokensOfTiles {
  using T = typename Loop::T;

 public:
  // first_z, first_x: of the block's columns, in token 0 of tile 0. order: the expert's tiles, at least one.
  __device__ __forceinline__ TokensOfTiles(const GroupedOuterArgs<T>& args, const T* first_z, const T* first_x,
                                           int columns_z, int columns_x, const int* order, int tiles)
      : args_(args), first_z_(first_z), first_x_(first_x), z_(first_z, args.stride_zt, columns_z),
        x_(first_x, args.stride_xt, columns_x), order_(order), tiles_(tiles), next_(*order) {}

  // Of these tiles kStages - 1 have been asked for before.
  __device__ __forceinline__ bool whole(int tiles) const { return left_ >= (tiles - Loop::kStages + 1) * Loop::kDepth; }
  template <bool kWhole>
  __device__ __forceinline__ void load(uint32_t buffer, int) {
    if (!kWhole && left_ <= 0 && tiles_ > 0) start();
    z_.template load<kWhole>(buffer, 0, left_);
    x_.template load<kWhole>(buffer + Loop::TileA::kBytes, 0, left_);
    left_ -= Loop::kDepth;
  }
  __device__ __forceinline__ void advance(int) {}

 private:
  __device__ __forceinline__ void start() {
    const Rows rows = rows_of(args_, next_);
    z_.start(first_z_ + rows.first * args_.stride_zb);
    x_.start(first_x_ + rows.first * args_.stride_xb);
    left_ = rows.tokens;
    if (--tiles_ > 0) next_ = *++order_;  // long before it is needed
  }

  const GroupedOuterArgs<T>& args_;
  const T *first_z_, *first_x_;
  Loader<typename Loop::TileA> z_;
  Loader<typename Loop::TileB> x_;
  const int* order_;
  int tiles_, next_;
  int left_ = 0;  // tokens of the tile that have not been asked for
};

// Stores the block at rows x columns of a gradient `depth` wide, or adds it to what is there.
template <class Loop, typename Out>
__device__ __forceinline__ void store_gradient(const typename Loop::Accumulators& acc, Out* out, int rows, int columns,
                                               int depth, bool accumulate, bool aligned) {
  for_each_piece<Loop>(acc, [&](int row, int column, float(&v)[kPiece]) {
    if (row >= rows || column >= columns) return;
    Out* to = out + static_cast<long long>(row) * depth + column;
    if (accumulate) {
      float before[kPiece];
      load_piece(before, to, columns - column, aligned);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] += before[j];
    }
    store_piece(to, v, columns - column, aligned);
  });
}

// How many tiles of kDepth tokens an expert's tiles take. One without rows takes one of zeros: a loop that passed it by
// would take registers. For whole warps.
template <int kDepth, class Args>
__device__ __forceinline__ int count_steps(const Args& args, const int* order, int tiles) {
  if (!args.cu_seqlens) return tiles * ceil_div(args.tokens, kDepth);
  int steps = 0;
  for (int i = threadIdx.x % 32; i < tiles; i += 32) {
    steps += max(ceil_div(rows_of(args, order[i]).tokens, kDepth), 1);
  }
  return __reduce_add_sync(~0u, steps);
}

template <class Config, typename T>
__device__ void grouped_outer_block(const GroupedOuterArgs<T>& args) {
  using Loop = typename Config::Loop;
  const int blocks_k = ceil_div(args.depth, Loop::kBlockN), blocks = args.blocks_n * blocks_k;
  const int e = blockIdx.x / blocks;
  const Place place = locate(blockIdx.x % blocks, args.blocks_n, blocks_k);
  const Columns at = columns_of(place.row, args.width0, args.width1, args.width2, Loop::kBlockM);
  const int k = place.column * Loop::kBlockN, rows = at.width - at.first, columns = args.depth - k;
  const int start = args.offsets[e], tiles = args.offsets[e + 1] - start;

  typename Loop::Accumulators acc;
  Loop::clear(acc);
  if (tiles > 0) {
    TokensOfTiles<Loop> source(args, args.z + at.before + at.first, args.x + k, rows, columns, args.order + start,
                               tiles);
    const int steps = count_steps<Loop::kDepth>(args, args.order + start, tiles);
    Loop::run(acc, source, steps, shared_address(dynamic_shared()));
  }
  void* out = pick(at.tensor, args.out0, args.out1, args.out2);
  const long long at_row = static_cast<long long>(e) * at.width + at.first, first = at_row * args.depth + k;
  if (args.main) {
    float* to = static_cast<float*>(out) + first;
    store_gradient<Loop>(acc, to, rows, columns, args.depth, args.accumulate, args.aligned);
  } else {
    store_gradient<Loop>(acc, static_cast<T*>(out) + first, rows, columns, args.depth, false, args.aligned);
  }
}

template <class Loop_>
struct GroupedOuterConfig {
  using Loop = Loop_;
  static constexpr int kThreads = Loop::kThreads;
  static constexpr int kMinBlocks = Loop::kMinBlocks;
  static constexpr int kSharedBytes = Loop::kSharedBytes;
  static constexpr void constants(Facts& facts) {
    facts.constant("block_n", Loop::kBlockM), facts.constant("block_k", Loop::kBlockN);
  }
};

}  // namespace mixpert
