// The main loop on tensor cores: acc (kBlockM x kBlockN) += sum over k of A (m, k) B (n, k), for float16 and bfloat16.
//
// Warps share the block as kWarpsM x kWarpsN; a warp holds its part in registers, as blocks of 16 x 8 (mma.sync). Every
// output has one accumulator and k ascends in steps of 16, so all shapes give the same bits.
//
// Tiles of kDepth of k pass through kStages buffers. While the products of a step of 16 run, the operands of the next one
// are loaded from shared memory, and the tile kStages - 1 ahead is on its way from global memory. One barrier a tile: it
// says that the next tile has landed, and that all warps have left the buffer that is filled next.
#pragma once

#include "tile.cuh"

namespace mixpert {

template <typename T_, int kBlockM_, int kBlockN_, int kDepth_, int kStages_, int kWarpsM_, int kWarpsN_,
          Major kMajorA = Major::kK, Major kMajorB = Major::kK>
struct TensorCoreLoop {
  using T = T_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kSpanM = kBlockM / kWarpsM, kSpanN = kBlockN / kWarpsN;  // of a warp
  static constexpr int kRows = kSpanM / 16, kColumns = kSpanN / 8;              // blocks of a warp
  static constexpr int kSteps = kDepth / 16;
  using TileA = Tile<T, kMajorA, kBlockM, kDepth, kThreads>;
  using TileB = Tile<T, kMajorB, kBlockN, kDepth, kThreads>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSteps % 2 == 0 && kSpanN % 16 == 0 && kStages >= 3);

  using Accumulators = float[kRows][kColumns][4];

  static __device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kRows * kColumns * 4; ++i) (&acc[0][0][0])[i] = 0.0f;
  }

  // Adds `tiles` tiles of k. All threads of the block call this, once or several times with the same acc; afterwards
  // shared memory is free and the source spent.
  //
  // Source::load(buffer, ahead) copies a tile of A and, TileA::kBytes further, of B, or zeros when there is none left:
  // the one that is `ahead` of those that Source::advance(tiles) has passed. Every tile is asked for once, in order, and
  // kStages - 1 more than there are.
  template <class Source>
  static __device__ __forceinline__ void run(Accumulators& acc, Source& source, int tiles, uint32_t shared) {
    const int warp = threadIdx.x / 32;
    const Fragments<TileA, kSpanM, 3> place_a(shared, warp / kWarpsN * kSpanM);
    const Fragments<TileB, kSpanN, 4> place_b(shared + TileA::kBytes, warp % kWarpsN * kSpanN);
    uint32_t a[2][kRows][4], b[2][kColumns / 2][4];
    const auto load_step = [&](int into, int stage, int step) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) place_a.load(a[into][i], stage * kStageBytes, i, step);
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) place_b.load(b[into][j], stage * kStageBytes, j, step);
    };

#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      source.load(shared + stage * kStageBytes, stage);
      copy_commit();
    }
    copy_wait<kStages - 2>();
    __syncthreads();
    load_step(0, 0, 0);
    for (; tiles > 0; source.advance(kStages)) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {  // unrolled: a buffer is a constant in every address
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int now = step % 2;
          if (step < kSteps - 1) {
            load_step(1 - now, stage, step + 1);
          } else {
            copy_wait<kStages - 2>();
            __syncthreads();
            load_step(1 - now, (stage + 1) % kStages, 0);
          }
          if (step == 0) {
            constexpr int kAhead = kStages - 1;
            source.load(shared + (stage + kAhead) % kStages * kStageBytes, stage + kAhead);
            copy_commit();
          }
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const auto& of = b[now][j / 2];
              multiply_add<T>(acc[i][j], a[now][i], of[j % 2 * 2], of[j % 2 * 2 + 1]);
            }
          }
        }
        if (--tiles == 0) break;
      }
    }
    copy_wait<0>();
    __syncthreads();
  }
};

// The source of one product: the tiles of two operands.
template <class Loop>
struct Product {
  Loader<typename Loop::TileA> a;
  Loader<typename Loop::TileB> b;

  __device__ __forceinline__ void load(uint32_t buffer, int ahead) {
    a.load(buffer, ahead);
    b.load(buffer + Loop::TileA::kBytes, ahead);
  }
  __device__ __forceinline__ void advance(int tiles) {
    a.advance(tiles);
    b.advance(tiles);
  }
};

}  // namespace mixpert
