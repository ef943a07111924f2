// One launch instead of several that follow from one another: a block draws a ticket and does what it says. Tickets
// that others wait for come first. So what a ticket waits for has a lower number, and its block has started; by
// induction every block ends, however few fit the chip at once and in whatever order it starts them.
//
// The work is that of the separate launches, by the same functions in the same order: so are the bits of the results.
#pragma once

#include "grouped_linear.cuh"
#include "rows.cuh"
#include "sync.cuh"

namespace mixpert {

// What kernels take that normalise rows and multiply them. Rows are vectors of 16 bytes and fit normalise_row.
#define MIXPERT_TICKET_FIELDS(FIELD)                                                      \
  FIELD(const T*, x)            /* (B, T, D) */                                           \
  FIELD(const T*, norm_weight)  /* (E, D) */                                              \
  FIELD(const T*, norm_bias)    /* (E, D) or null */                                      \
  FIELD(const T*, w0)           /* (E, N, D) */                                           \
  FIELD(const T*, w1)           /* (E, N, D) or null */                                   \
  FIELD(const T*, w2)                                                                     \
  FIELD(const T*, b0)           /* (E, N) or null, the bias of w0 */                      \
  FIELD(const T*, b1)                                                                     \
  FIELD(const T*, b2)                                                                     \
  FIELD(T*, h)                  /* (B, T, D), the normalised rows */                      \
  FIELD(T*, y)                  /* (B, T, weights * N) */                                 \
  FIELD(int*, ticket)           /* (1,) zero */                                           \
  FIELD(int*, ready)            /* (B, ceil_div(T, kBlockM)) zeros: normalised tickets */ \
  FIELD(long long, stride_xb)                                                             \
  FIELD(long long, stride_xt)                                                             \
  FIELD(long long, stride_we)                                                             \
  FIELD(long long, stride_wn)                                                             \
  FIELD(long long, stride_yb)                                                             \
  FIELD(long long, stride_yt)                                                             \
  FIELD(int, tokens)                                                                      \
  FIELD(int, width)             /* D */                                                   \
  FIELD(int, depth)             /* D, too: what a product calls it */                     \
  FIELD(int, columns)           /* N */                                                   \
  FIELD(int, weights)                                                                     \
  FIELD(int, activation)                                                                  \
  FIELD(int, vectors)           /* outputs and bias are aligned vectors */                \
  FIELD(float, norm_eps)

// What linear_block also asks for, and is not there.
template <typename T>
struct TicketOutputs {
  static constexpr const T* scale = nullptr;
  static constexpr const T* residual = nullptr;
  static constexpr T* pre = nullptr;
  static constexpr const int* cu_seqlens = nullptr;
};

constexpr int kNormRows = 8;  // rows of a ticket, two a warp: 92 tickets for 729 tokens

template <class Loop_>
struct TicketConfig {
  using Loop = Loop_;
  static constexpr int kThreads = Loop::kThreads;
  static constexpr int kMinBlocks = Loop::kMinBlocks;
  static constexpr int kSharedBytes = Loop::kSharedBytes;
  static_assert(Loop::kBlockM % kNormRows == 0);
  static constexpr void constants(Facts& facts) {
    facts.constant("block_m", Loop::kBlockM);
    facts.constant("block_n", Loop::kBlockN);
    facts.constant("norm_rows", kNormRows);
    facts.constant("widest", kWidestRow);
  }
};

// The next ticket, in all threads of the block.
__device__ __forceinline__ int draw_ticket(int* counter) {
  __shared__ int drawn;
  if (threadIdx.x == 0) drawn = atomicAdd(counter, 1);
  __syncthreads();
  return drawn;
}

// A ticket of kNormRows rows of one tile: h = LayerNorm(x). expert_of(tile) may wait; each warp asks when it must know.
template <class Config, typename T, class Args, class F>
__device__ __forceinline__ void normalise_ticket(const Args& args, int ticket, const F& expert_of) {
  const int blocks = ceil_div(args.tokens, kNormRows), tile = ticket / blocks, first = ticket % blocks * kNormRows;
  const int end = min(first + kNormRows, args.tokens);
  const auto affine = [&] {
    const long long gain = static_cast<long long>(expert_of(tile)) * args.width;
    return Affine<T>{args.norm_weight + gain, args.norm_bias ? args.norm_bias + gain : nullptr};
  };
  for (int t = first + threadIdx.x / kWarp; t < end; t += Config::kThreads / kWarp) {
    T* h = args.h + (static_cast<long long>(tile) * args.tokens + t) * args.width;
    normalise_row(args.x + tile * args.stride_xb + t * args.stride_xt, affine, h, args.width, args.norm_eps);
  }
  constexpr int kBlockM = Config::Loop::kBlockM;
  __syncthreads();
  if (threadIdx.x == 0) add_release(args.ready + tile * ceil_div(args.tokens, kBlockM) + first / kBlockM, 1);
}

// A ticket of one block of outputs, once its rows are there; whoever normalised them knew the expert.
template <class Config, class Args, class F>
__device__ __forceinline__ void multiply_ticket(const Args& args, int ticket, const F& expert_of) {
  using Loop = typename Config::Loop;
  const int token_blocks = ceil_div(args.tokens, Loop::kBlockM);
  const int column_blocks = args.weights * ceil_div(args.columns, Loop::kBlockN);
  const Place place = locate(ticket, args.batch * token_blocks, column_blocks);
  const int tile = place.row / token_blocks, first_row = place.row % token_blocks * Loop::kBlockM;
  const int rows = min(args.tokens - first_row, Loop::kBlockM);
  if (threadIdx.x == 0) wait_for(args.ready + place.row, ceil_div(rows, kNormRows));
  __syncthreads();
  const auto* h = args.h + static_cast<long long>(tile) * args.tokens * args.width;
  linear_block<Loop>(args, h, args.width, args.tokens, tile, expert_of(tile), first_row, place.column);
}

}  // namespace mixpert
