// The main loop on tensor cores: acc (kBlockM x kBlockN) += sum over k of A (m, k) B (n, k), for float16 and bfloat16.
//
// Warps share the block as kWarpsM x kWarpsN; a warp holds its part in registers, as blocks of 16 x 8 (mma.sync). Every
// output has one accumulator and k ascends in steps of 16, so all shapes give the same bits.
//
// Tiles of kDepth of k pass through kStages buffers. While a step of 16 is multiplied, the operands of the next are
// loaded from shared memory, those of A into registers of their own, each of B in the place of the one whose products
// have just been issued; and the tile kStages - 1 ahead is on its way from global memory. One barrier a tile: it says
// that the next tile has landed, and that all warps have left the buffer that is filled next.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "tile.cuh"

namespace mixpert {

// kMinBlocks: that a multiprocessor must hold, which limits the registers.
template <typename T_, int kBlockM_, int kBlockN_, int kDepth_, int kStages_, int kWarpsM_, int kWarpsN_,
          int kMinBlocks_, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
struct TensorCoreLoop {
  using T = T_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kMinBlocks = kMinBlocks_;
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
  using WarpStrip = Strip<kSpanN>;
  static constexpr int kStrips = kRows;
  static_assert(kWarpsM * kWarpsN * WarpStrip::kBytes <= kSharedBytes);

  static __device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kRows * kColumns * 4; ++i) (&acc[0][0][0])[i] = 0.0f;
  }

  // Adds `tiles` tiles of k. All threads of the block call this, once or several times with the same acc; afterwards
  // shared memory is free and the source spent.
  //
  // Source::load<kWhole>(buffer, ahead) copies a tile of A and, TileA::kBytes further, of B, or zeros when there is
  // none left: the one that is `ahead` of those that Source::advance(tiles) has passed. Every tile is asked for once,
  // in order, and kStages - 1 more than there are. Source::whole(tiles) says whether so many lie ahead that need no
  // mask: they are copied with kWhole.
  template <class Source>
  static __device__ __forceinline__ void run(Accumulators& acc, Source& source, int tiles, uint32_t shared) {
    const Fragments<TileA, kSpanM, 3> place_a(shared, warp_row());
    const Fragments<TileB, kSpanN, 4> place_b(shared + TileA::kBytes, warp_column());
    uint32_t a[2][kRows][4], b[kColumns / 2][4];
    const auto load_a = [&](int into, int stage, int step) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) place_a.load(a[into][i], stage * kStageBytes, i, step);
    };
    const auto load_b = [&](int j, int stage, int step) { place_b.load(b[j], stage * kStageBytes, j, step); };

    constexpr int kAhead = kStages - 1;
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      source.template load<false>(shared + stage * kStageBytes, stage);
      copy_commit();
    }
    copy_wait<kStages - 2>();
    __syncthreads();
    load_a(0, 0, 0);
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) load_b(j, 0, 0);

    // A round passes through all buffers: which one is used is a constant in every address.
    const auto round = [&](auto whole) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int now = step % 2, next = (step + 1) % kSteps;
          const int next_stage = next ? stage : (stage + 1) % kStages;
          if (next == 0) {
            copy_wait<kStages - 2>();
            __syncthreads();
          }
          load_a(1 - now, next_stage, next);
          if (step == 0) {
            const uint32_t buffer = shared + (stage + kAhead) % kStages * kStageBytes;
            source.template load<decltype(whole)::value>(buffer, stage + kAhead);
            copy_commit();
          }
#pragma unroll
          for (int j = 0; j < kColumns / 2; ++j) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              multiply_add<T>(acc[i][2 * j], a[now][i], b[j][0], b[j][1]);
              multiply_add<T>(acc[i][2 * j + 1], a[now][i], b[j][2], b[j][3]);
            }
            load_b(j, next_stage, next);
          }
        }
        if (!decltype(whole)::value && stage + 1 == tiles) break;
      }
      source.advance(kStages);
      tiles -= kStages;
    };
    while (tiles > 0) {
      while (source.whole(kStages + kAhead)) round(std::true_type());
      round(std::false_type());
    }
    copy_wait<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / kWarpsN * kSpanM; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % kWarpsN * kSpanN; }

  // Writes 16 rows of the warp's accumulators. The number may vary at run time: registers cannot be indexed, code can.
  static __device__ __forceinline__ void store_strip(const Accumulators& acc, int number, unsigned char* strip) {
    const unsigned thread = thread_anew();
    const int row = thread % 32 / 4, column = thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i != number) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        *reinterpret_cast<float2*>(WarpStrip::at(strip, row, column + 8 * j)) = {acc[i][j][0], acc[i][j][1]};
        *reinterpret_cast<float2*>(WarpStrip::at(strip, row + 8, column + 8 * j)) = {acc[i][j][2], acc[i][j][3]};
      }
    }
  }
};

// The source of one product: the tiles of two operands, `left` numbers of k.
template <class Loop>
struct Product {
  Loader<typename Loop::TileA> a;
  Loader<typename Loop::TileB> b;
  int left;

  __device__ __forceinline__ bool whole(int tiles) const { return left >= tiles * Loop::kDepth; }
  template <bool kWhole>
  __device__ __forceinline__ void load(uint32_t buffer, int ahead) {
    a.template load<kWhole>(buffer, ahead, left - ahead * Loop::kDepth);
    b.template load<kWhole>(buffer + Loop::TileA::kBytes, ahead, left - ahead * Loop::kDepth);
  }
  __device__ __forceinline__ void advance(int tiles) {
    a.advance(tiles);
    b.advance(tiles);
    left -= tiles * Loop::kDepth;
  }
};

}  // namespace mixpert
