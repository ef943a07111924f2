// dx[b, t, k] = act'(pre[b, t, k]) * sum_i sum_n dz[b, t, i * N + n] * w_i[e, n, k]     with e = expert[b]
// h[b, t, k] = act(pre[b, t, k])
//
// pre is what the features were before the activation of the layer below: its gradient ends here and its output is
// computed again, so that neither is a pass of its own. Here the columns of a block are k, and the sum is over n.
//
// One block computes kBlockM tokens of one tile x kBlockN columns, visited as in grouped_linear. It adds the weights up
// one after the other, for which N is a multiple of kDepth where there are several.
// Grid: B * ceil(T / kBlockM) * ceil(K / kBlockN); of packed rows (R / kBlockM + B) * ceil(K / kBlockN) (packed.cuh).
#pragma once

#include "activations.cuh"
#include "kernel.cuh"
#include "loops.cuh"
#include "packed.cuh"
#include "pieces.cuh"
#include "schedule.cuh"
#include "types.cuh"

namespace mixpert {

template <typename T>
struct LinearBackwardArgs {
#define FIELDS(FIELD)                                                                \
  FIELD(const T*, dz)         /* (B, T, weights * N), or packed rows (R, ...) */     \
  FIELD(const T*, w0)         /* (E, N, K) */                                        \
  FIELD(const T*, w1)         /* (E, N, K) or null */                                \
  FIELD(const T*, w2)         /* (E, N, K) or null */                                \
  FIELD(const T*, pre)        /* (B, T, K) or null */                                \
  FIELD(T*, dx)               /* (B, T, K) */                                        \
  FIELD(T*, h)                /* (B, T, K) or null */                                \
  FIELD(const int*, expert)   /* (B,) */                                             \
  FIELD(const int*, order)    /* (B,) */                                             \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */             \
  FIELD(int, batch)                                                                  \
  FIELD(int, tokens)          /* T, or R */                                          \
  FIELD(int, columns)         /* K */                                                \
  FIELD(int, depth)           /* N */                                                \
  FIELD(int, weights)                                                                \
  FIELD(int, activation)                                                             \
  FIELD(int, aligned)         /* whether all pieces of pre, dx and h are */          \
  FIELD(long long, stride_zb)                                                        \
  FIELD(long long, stride_zt)                                                        \
  FIELD(long long, stride_we)                                                        \
  FIELD(long long, stride_wn)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

// The source of the sum: dz along all its columns, and the rows of one weight after the other.
template <class Loop>
class WeightsInTurn {
  using T = typename Loop::T;

 public:
  __device__ __forceinline__ WeightsInTurn(const LinearBackwardArgs<T>& args, const T* first_z, int tokens,
                                           long long first_w, int columns)
      : args_(args), first_w_(first_w), z_(first_z, args.stride_zt, tokens),
        w_(args.w0 + first_w, args.stride_wn, columns), left_(args.depth), left_z_(args.weights * args.depth) {}

  // Of these tiles kStages - 1 have been asked for before.
  __device__ __forceinline__ bool whole(int tiles) const { return left_ >= (tiles - Loop::kStages + 1) * Loop::kDepth; }
  template <bool kWhole>
  __device__ __forceinline__ void load(uint32_t buffer, int ahead) {
    if (!kWhole && left_ <= 0 && next_ < args_.weights) {
      w_.start(pick(next_, args_.w0, args_.w1, args_.w2) + first_w_);
      left_ = args_.depth, ++next_;
    }
    z_.template load<kWhole>(buffer, ahead, left_z_);
    w_.template load<kWhole>(buffer + Loop::TileA::kBytes, ahead, left_);
    left_ -= Loop::kDepth, left_z_ -= Loop::kDepth;
  }
  __device__ __forceinline__ void advance(int tiles) { z_.advance(tiles); }

 private:
  const LinearBackwardArgs<T>& args_;
  long long first_w_;  // element of a weight
  Loader<typename Loop::TileA> z_;
  Loader<typename Loop::TileB> w_;
  int left_, left_z_;  // rows of the weight and columns of dz that have not been asked for
  int next_ = 1;
};

template <class Config, typename T>
__device__ void linear_backward_block(const LinearBackwardArgs<T>& args) {
  using Loop = typename Config::Loop;
  const Place place = locate(blockIdx.x, count_row_blocks<Loop::kBlockM>(args), ceil_div(args.columns, Loop::kBlockN));
  const RowBlock at = row_block<Loop::kBlockM>(args, place.row, [&](int i) { return args.order[i]; });
  if (!at.has_rows()) return;
  const long long b = at.first, e = args.expert[at.tile];
  const int token = at.first_row, column = place.column * Loop::kBlockN;
  const int tokens = at.tokens - token, columns = args.columns - column;

  typename Loop::Accumulators acc;
  Loop::clear(acc);
  WeightsInTurn<Loop> source(args, args.dz + b * args.stride_zb + token * args.stride_zt, tokens,
                             e * args.stride_we + column, columns);
  Loop::run(acc, source, ceil_div(args.weights * args.depth, Loop::kDepth), shared_address(dynamic_shared()));

  const long long first = (row_number(args, b) + token) * args.columns + column;
  for_each_piece<Loop>(acc, [&](int row, int k, float(&v)[kPiece]) {
    if (row >= tokens || k >= columns) return;
    const long long at = first + static_cast<long long>(row) * args.columns + k;
    if (args.pre) {
      float pre[kPiece], h[kPiece];
      load_piece(pre, args.pre + at, columns - k, args.aligned);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) h[j] = pre[j];
      activate(h, args.activation);
      store_piece(args.h + at, h, columns - k, args.aligned);
      multiply_by_grad(v, pre, args.activation);
    }
    store_piece(args.dx + at, v, columns - k, args.aligned);
  });
}

template <class Loop_>
struct LinearBackwardConfig {
  using Loop = Loop_;
  static constexpr int kThreads = Loop::kThreads;
  static constexpr int kMinBlocks = Loop::kMinBlocks;
  static constexpr int kSharedBytes = Loop::kSharedBytes;
  static constexpr void constants(Facts& facts) {
    facts.constant("block_m", Loop::kBlockM), facts.constant("block_n", Loop::kBlockN);
    facts.constant("block_k", Loop::kDepth);
  }
};

}  // namespace mixpert
