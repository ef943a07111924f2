// The main loop of sm_90a for operands that TMA must not read, since they were written in the same launch: wgmma on
// tiles that cp.async copies. It adds as grouped_linear_sm90a.cuh does, k ascending in steps of 16, the first of which
// adds to nothing: so it gives the same bits.
//
// One warpgroup multiplies 64 x 128 blocks. Tiles lie as Tile places them, which at a depth of 64 is the 128-byte
// swizzle that wgmma reads. While the products of one tile run, those of the next are issued, and the tile kStages - 2
// ahead is on its way into the buffer that the products before both have left.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"
#include "tile.cuh"

namespace mixpert {

// What this thread's cp.async brought to shared memory, wgmma sees after a barrier of the block.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <typename T_>
struct WarpgroupLoop {
  using T = T_;
  static constexpr int kBlockM = 64, kBlockN = 128, kDepth = 64, kStages = 4;
  static constexpr int kThreads = hopper::kWarpgroup, kMinBlocks = 2;
  using TileA = Tile<T, Major::kK, kBlockM, kDepth, kThreads>;
  using TileB = Tile<T, Major::kK, kBlockN, kDepth, kThreads>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + hopper::kSwizzleAlign;  // the start is moved up to it
  static_assert(TileA::kRowBytes == 128 && TileA::kBytes % hopper::kSwizzleAlign == 0);
  static_assert(kStageBytes % hopper::kSwizzleAlign == 0);

  using Accumulators = hopper::Accumulators;
  using WarpStrip = Strip<kBlockN>;  // all that a warp has
  static constexpr int kStrips = 1;
  static_assert(kThreads / 32 * WarpStrip::kBytes <= kSharedBytes);

  static __device__ __forceinline__ void clear(Accumulators&) {}  // run() sets them

  // acc = the product of `tiles` tiles of k. All threads of the block call this, once; shared memory is free after it.
  // Source: as for TensorCoreLoop.
  template <class Source>
  static __device__ __forceinline__ void run(Accumulators& acc, Source& source, int tiles, uint32_t shared) {
    constexpr int kAhead = kStages - 2;
    shared = (shared + hopper::kSwizzleAlign - 1) / hopper::kSwizzleAlign * hopper::kSwizzleAlign;
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      source.template load<false>(shared + stage * kStageBytes, stage);
      copy_commit();
    }
    int stage = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      copy_wait<kAhead - 1>();
      fence_copies();
      hopper::wait_groups<1>();  // the tile before the last one has been read
      __syncthreads();
      issue(acc, shared + stage * kStageBytes, tile > 0);
      const uint32_t buffer = shared + (stage + kAhead) % kStages * kStageBytes;
      if (source.whole(kAhead + 1)) {
        source.template load<true>(buffer, kAhead);
      } else {
        source.template load<false>(buffer, kAhead);
      }
      copy_commit();
      source.advance(1);
      stage = (stage + 1) % kStages;
    }
    hopper::wait_groups<0>();
    acc.pin();
    copy_wait<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ void store_strip(const Accumulators& acc, int, unsigned char* strip) {
    hopper::store_strip<WarpStrip>(acc, 0, strip);
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * WarpStrip::kRows; }
  static __device__ __forceinline__ int warp_column() { return 0; }

 private:
  static __device__ __forceinline__ void issue(Accumulators& acc, uint32_t buffer, bool add) {
    const uint32_t a = hopper::descriptor(buffer), b = hopper::descriptor(buffer + TileA::kBytes);
    hopper::fence_operands();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      hopper::multiply<T>(acc, a + k * 32 / hopper::kUnit, b + k * 32 / hopper::kUnit, add || k > 0);
    }
    hopper::commit();
  }
};

}  // namespace mixpert
