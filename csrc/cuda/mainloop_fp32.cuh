// The main loop for float32, exact: acc[m, n] = fma(A[m, k], B[n, k], acc[m, n]) for k = 0, 1, 2, ..., so that all
// shapes give the same bits. Tensor cores would round the operands to TF32.
//
// A warp computes 32 x 8 kThreadN, its lanes lie 4 x 8. A thread computes 8 x kThreadN: where k is contiguous, every
// fourth row and every eighth column, read as four numbers of k; where mn is, runs of four neighbours, read as such. Of
// both, lanes that read at once read 128 different bytes of shared memory, or the same.
//
// Tiles pass through kStages buffers as in mainloop.cuh, with the same sources.
#pragma once

#include "epilogue.cuh"
#include "tile.cuh"

namespace mixpert {

template <int kBlockM_, int kBlockN_, int kDepth_, int kStages_, int kWarpsM_, int kWarpsN_, int kThreadN_,
          int kMinBlocks_, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
struct FmaLoop {
  using T = float;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kThreadM = 8, kThreadN = kThreadN_;
  static constexpr int kSpanM = 4 * kThreadM, kSpanN = 8 * kThreadN;  // of a warp
  using TileA = Tile<T, kMajorA, kBlockM, kDepth, kThreads>;
  using TileB = Tile<T, kMajorB, kBlockN, kDepth, kThreads>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kBlockM == kWarpsM * kSpanM && kBlockN == kWarpsN * kSpanN && kStages >= 2);

  using Accumulators = float[kThreadM][kThreadN];
  using WarpStrip = Strip<kSpanN>;
  static constexpr int kStrips = kSpanM / WarpStrip::kRows;
  static_assert(kWarpsM * kWarpsN * WarpStrip::kBytes <= kSharedBytes);

  static __device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kThreadM * kThreadN; ++i) (&acc[0][0])[i] = 0.0f;
  }

  // As TensorCoreLoop::run.
  template <class Source>
  static __device__ __forceinline__ void run(Accumulators& acc, Source& source, int tiles, uint32_t shared) {
    constexpr int kAhead = kStages - 1;
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      source.template load<false>(shared + stage * kStageBytes, stage);
      copy_commit();
    }
    uint32_t buffer = shared, filled = shared + kAhead * kStageBytes;
    const uint32_t end = shared + kSharedBytes;
    for (int tile = 0; tile < tiles; ++tile) {
      copy_wait<kStages - 2>();
      __syncthreads();  // this tile has landed, and all warps have left the buffer that is filled now
      if (source.whole(kStages)) {
        source.template load<true>(filled, kAhead);
      } else {
        source.template load<false>(filled, kAhead);
      }
      copy_commit();
      source.advance(1);
#pragma unroll 2
      for (int k = 0; k < kDepth; k += 4) {
        float a[kThreadM][4], b[kThreadN][4];
        load_operand<TileA, kThreadM, 4>(a, buffer, warp_row(), threadIdx.x % 32 / 8, k);
        load_operand<TileB, kThreadN, 8>(b, buffer + TileA::kBytes, warp_column(), threadIdx.x % 8, k);
#pragma unroll
        for (int next = 0; next < 4; ++next) {
#pragma unroll
          for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadN; ++j) acc[i][j] = fmaf(a[i][next], b[j][next], acc[i][j]);
          }
        }
      }
      buffer = buffer + kStageBytes == end ? shared : buffer + kStageBytes;
      filled = filled + kStageBytes == end ? shared : filled + kStageBytes;
    }
    copy_wait<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / kWarpsN * kSpanM; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % kWarpsN * kSpanN; }

  static __device__ __forceinline__ void store_strip(const Accumulators& acc, int number, unsigned char* strip) {
    const unsigned thread = thread_anew();
    constexpr int kRows = kThreadM / kStrips;
    const int y = thread % 32 / 8, x = thread % 8;
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      if (i / kRows != number) continue;
      const int row = place_of<TileA, 4>(i, y) % WarpStrip::kRows;
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) *WarpStrip::at(strip, row, place_of<TileB, 8>(j, x)) = acc[i][j];
    }
  }

 private:
  // Which of the warp's rows (columns) is the i-th of a thread; kLanes of them lie side by side.
  template <class Tile, int kLanes>
  static __device__ __forceinline__ int place_of(int i, int lane) {
    return Tile::kAlongK ? lane + kLanes * i : 4 * lane + i % 4 + 4 * kLanes * (i / 4);
  }

  // to[i][next] = operand (first + place of i, k + next).
  template <class Tile, int kCount, int kLanes>
  static __device__ __forceinline__ void load_operand(float (&to)[kCount][4], uint32_t tile, int first, int lane,
                                                      int k) {
    if constexpr (Tile::kAlongK) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float4 four = load_four(tile + Tile::place(first + place_of<Tile, kLanes>(i, lane), k / 4));
        to[i][0] = four.x, to[i][1] = four.y, to[i][2] = four.z, to[i][3] = four.w;
      }
    } else {
#pragma unroll
      for (int next = 0; next < 4; ++next) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          const int chunk = (first + place_of<Tile, kLanes>(i, lane)) / 4;
          const float4 four = load_four(tile + Tile::place(k + next, chunk));
          to[i][next] = four.x, to[i + 1][next] = four.y, to[i + 2][next] = four.z, to[i + 3][next] = four.w;
        }
      }
    }
  }
};

}  // namespace mixpert
