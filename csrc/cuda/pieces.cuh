// Accumulators handed on as pieces of a row, four neighbouring numbers each, so that what a warp then loads and stores
// fills whole sectors.
#pragma once

#include "epilogue.cuh"
#include "types.cuh"

namespace mixpert {

constexpr int kPiece = 4;

template <typename T>
struct alignas(kPiece * sizeof(T)) Piece {
  T v[kPiece];
};

// The piece at `from`, of which `valid` numbers are there; at once where pieces are aligned.
template <typename T>
__device__ __forceinline__ void load_piece(float (&v)[kPiece], const T* from, int valid, bool aligned) {
  if (aligned) {
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) v[j] = to_float(piece.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) v[j] = j < valid ? to_float(from[j]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store_piece(T* to, const float (&v)[kPiece], int valid, bool aligned) {
  if (aligned) {
    Piece<T> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece.v[j] = from_float<T>(v[j]);
    *reinterpret_cast<Piece<T>*>(to) = piece;
  } else {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if (j < valid) to[j] = from_float<T>(v[j]);
    }
  }
}

// Calls f(row, column, numbers) for all pieces of a block, a warp for those of its own part, row by row. Accumulators
// pass through strips of shared memory, which the main loop has left.
template <class Loop, class F>
__device__ __forceinline__ void for_each_piece(const typename Loop::Accumulators& acc, const F& f) {
  using Strip = typename Loop::WarpStrip;
  constexpr int kLanes = Strip::kColumns / kPiece, kRowsAtOnce = 32 / kLanes;  // lanes to a row
  static_assert(32 % kLanes == 0);
  unsigned char* strip = dynamic_shared() + threadIdx.x / 32 * Strip::kBytes;
  const int lane = threadIdx.x % 32, column = lane % kLanes * kPiece;
#pragma unroll 1
  for (int i = 0; i < Loop::kStrips; ++i) {
    Loop::store_strip(acc, i, strip);
    __syncwarp();
#pragma unroll 2
    for (int row = lane / kLanes; row < Strip::kRows; row += kRowsAtOnce) {
      const float4 four = Strip::four(strip, row, column);
      float v[kPiece] = {four.x, four.y, four.z, four.w};
      f(Loop::warp_row() + i * Strip::kRows + row, Loop::warp_column() + column, v);
    }
    __syncwarp();
  }
}

}  // namespace mixpert
