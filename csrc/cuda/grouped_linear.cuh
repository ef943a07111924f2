// z[b, t, i * N + n] = sum_k x[b, t, k] * w_i[e, n, k] + bias_i[e, n]     with e = expert[b], i the weight
// y[b, t, c] = scale[e, c] * act(z[b, t, c]) + residual[b, t, c]          with c in [0, width), width = weights * N
//
// A block of outputs is kBlockM tokens of one tile x kBlockN columns of one weight. There are B * ceil(T / kBlockM) *
// weights * ceil(N / kBlockN), a number the host knows: no expert id ever leaves the device, and a captured graph
// replays for any routing. The blocks of the grid, as many as the chip holds at once, take outputs number blockIdx,
// blockIdx + grid, ...
//
// Tiles are visited expert by expert (order), so that blocks that run together share one expert's weights in L2; those
// of packed rows in batch order, by slots, R / kBlockM + B for B * ceil(T / kBlockM) (packed.cuh).
#pragma once

#include "epilogue.cuh"
#include "grouped_linear_args.cuh"
#include "loops.cuh"
#include "packed.cuh"
#include "schedule.cuh"

namespace mixpert {

template <class Loop_>
struct GroupedLinearConfig {
  using Loop = Loop_;
  static constexpr int kThreads = Loop::kThreads;
  static constexpr int kMinBlocks = Loop::kMinBlocks;
  static constexpr int kSharedBytes = Loop::kSharedBytes;
  static constexpr void constants(Facts& facts) {
    facts.constant("block_m", Loop::kBlockM);
    facts.constant("block_n", Loop::kBlockN);
    facts.constant("block_k", Loop::kDepth);
  }
};

// One block of outputs. x: of the tile, rows stride_xt apart; tokens: of the tile. Args has the fields of
// GroupedLinearArgs but for these.
template <class Loop, class Args, typename T>
__device__ __forceinline__ void linear_block(const Args& args, const T* x, long long stride_xt, int tokens, int tile,
                                             int expert, int first_row, int column_block) {
  const int weight_blocks = ceil_div(args.columns, Loop::kBlockN);
  typename Loop::Accumulators acc;
  Loop::clear(acc);
  unsigned char* shared = dynamic_shared();
  {
    const int i = column_block / weight_blocks, first_column = column_block % weight_blocks * Loop::kBlockN;
    const T* w = pick(i, args.w0, args.w1, args.w2) + expert * args.stride_we + first_column * args.stride_wn;
    Product<Loop> source{{x + first_row * stride_xt, stride_xt, tokens - first_row},
                         {w, args.stride_wn, args.columns - first_column},
                         args.depth};
    Loop::run(acc, source, ceil_div(args.depth, Loop::kDepth), shared_address(shared));
  }
  // Found anew: what is kept over the loop takes registers that it has no more of.
  asm volatile("" : "+r"(tile), "+r"(expert), "+r"(first_row), "+r"(column_block));
  const int i = column_block / weight_blocks, first_column = column_block % weight_blocks * Loop::kBlockN;
  const int width = args.weights * args.columns, column = i * args.columns + first_column;
  const Rows rows = rows_of(args, tile);
  const long long e = expert, place = rows.first * args.stride_yb + first_row * args.stride_yt + column;
  const T* bias = pick(i, args.b0, args.b1, args.b2);
  const Outputs<T> out{args.y + place,
                       args.pre ? args.pre + place : nullptr,
                       args.residual ? args.residual + place : nullptr,
                       bias ? bias + e * args.columns + first_column : nullptr,
                       args.scale ? args.scale + e * width + column : nullptr,
                       args.stride_yt,
                       rows.tokens - first_row,
                       args.columns - first_column,
                       args.activation,
                       args.vectors != 0};
  write_block<Loop>(acc, out, shared);
}

template <class Config, typename T>
__device__ __forceinline__ void grouped_linear(const GroupedLinearArgs<T>& args) {
  using Loop = typename Config::Loop;
  const int row_blocks = count_row_blocks<Loop::kBlockM>(args);
  const int column_blocks = args.weights * ceil_div(args.columns, Loop::kBlockN);
  for (int block = blockIdx.x; block < row_blocks * column_blocks; block += gridDim.x) {
    const Place place = locate(block, row_blocks, column_blocks);
    const RowBlock at = row_block<Loop::kBlockM>(args, place.row, [&](int i) { return args.order[i]; });
    if (!at.has_rows()) continue;
    linear_block<Loop>(args, args.x + at.first * args.stride_xb, args.stride_xt, at.tokens, at.tile,
                       args.expert[at.tile], at.first_row, place.column);
    __syncthreads();  // the next block fills the memory that strips are read from
  }
}

}  // namespace mixpert
