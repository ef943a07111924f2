// A tile of an operand: how it lies in shared memory, who copies which of its chunks, where ldmatrix finds them.
//
// An operand is a matrix (mn, k): mn counts the rows or columns of the product, k is summed over. In memory either k is
// contiguous (Major::kK: features, weights in the forward pass) or mn is (Major::kMN: weights in dX, both operands of
// the weight gradient). A tile keeps the operand's order, so that a chunk of 16 bytes stays one; ldmatrix transposes.
#pragma once

#include "copy.cuh"

namespace mixpert {

enum class Major { kK, kMN };

template <typename T_, Major kMajor_, int kBlock_, int kDepth_, int kThreads_>
struct Tile {
  using T = T_;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kBlock = kBlock_;  // of mn
  static constexpr int kDepth = kDepth_;  // of k
  static constexpr int kThreads = kThreads_;
  static constexpr bool kAlongK = kMajor == Major::kK;
  static constexpr int kNumbers = 16 / int(sizeof(T));  // in a chunk
  static constexpr int kRows = kAlongK ? kBlock : kDepth;
  static constexpr int kChunks = (kAlongK ? kDepth : kBlock) / kNumbers;  // a row
  static constexpr int kRowBytes = 16 * kChunks;
  static constexpr int kBytes = kRows * kRowBytes;

  // Chunks of a row are permuted by exclusive or with the row, so that neither the eight chunks of one column that
  // ldmatrix reads at once nor the eight of one row that eight threads write share a bank. Rows of 64 bytes lie two to
  // a line of banks. The float32 loop reads and writes neighbours of a row alone where mn is contiguous: in their place.
  static constexpr int kStep = kChunks < 8 ? 8 / kChunks : 1;
  static constexpr int kTurns = !kAlongK && sizeof(T) == 4 ? 1 : kChunks < 8 ? kChunks : 8;
  static_assert(kChunks % 4 == 0 && kBytes % 128 == 0);

  static constexpr __device__ __forceinline__ int turn(int row) { return row / kStep % kTurns; }
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + 16 * (chunk ^ turn(row));
  }
};

// Copies the tiles of an operand along k, one after the other. Neighbouring threads copy neighbouring chunks of a row,
// so that whole sectors are read. Past k the tile is filled with zeros. Nothing is made of what lies past the operand's
// mn: there the last row or chunk is copied again, or zeros.
//
// Rows must start at multiples of 16 bytes, and their length (k or mn) be one.
template <class Tile>
class Loader {
  using T = typename Tile::T;
  static constexpr bool kAlongK = Tile::kAlongK;
  static constexpr int kLanes = Tile::kChunks < 8 ? Tile::kChunks : Tile::kChunks > 16 ? 16 : 8;  // copy a row
  static constexpr int kAcross = Tile::kChunks / kLanes;  // chunks each
  static constexpr int kRowStep = Tile::kThreads / kLanes;
  static constexpr int kPasses = Tile::kRows / kRowStep;  // rows of a thread
  static_assert(Tile::kRows % kRowStep == 0 && kRowStep % (Tile::kStep * Tile::kTurns) == 0);
  static_assert(kAcross == 1 || (kAcross == 2 && !kAlongK));

 public:
  // first: element (0, 0) of the block. stride: elements from row to row. available: of mn, from the block's start on.
  __device__ __forceinline__ Loader(const T* first, long long stride, int available) : stride_(stride) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    to_ = Tile::place(row, chunk);
    if constexpr (kAlongK) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        from_[pass] = first + min(row + pass * kRowStep, available - 1) * stride + chunk * Tile::kNumbers;
      }
    } else {
      const int last = (available - 1) / Tile::kNumbers;
      column_ = min(chunk, last) * Tile::kNumbers;
      wide_ = chunk + kLanes <= last;
      start(first);
    }
  }

  // Goes on with other rows of the same stride and columns (Major::kMN).
  __device__ __forceinline__ void start(const T* first) {
    static_assert(!kAlongK);
    const int row = threadIdx.x / kLanes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) from_[pass] = first + column_ + (row + pass * kRowStep) * stride_;
  }

  // Copies to `tile` the tile that is `ahead` of those that advance() has passed. Each is copied once, in order;
  // `ahead` is a constant. left: numbers of k from the tile's first on; kWhole says that they fill it.
  template <bool kWhole>
  __device__ __forceinline__ void load(uint32_t tile, int ahead, int left) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t to = tile + to_ + pass * kRowStep * Tile::kRowBytes;
      if constexpr (kAlongK) {
        const T* from = from_[pass] + ahead * Tile::kDepth;
        if constexpr (kWhole) {
          copy_async(to, from);
        } else {
          copy_async(to, from, chunk * Tile::kNumbers < left);
        }
      } else {
        const bool inside = kWhole || row + pass * kRowStep < left;
        if constexpr (kWhole) {
          copy_async(to, from_[pass]);
        } else {
          copy_async(to, from_[pass], inside);
        }
        if constexpr (kAcross == 2) {
          copy_async(to + 16 * kLanes, from_[pass] + kLanes * Tile::kNumbers, inside && wide_);
        }
        move(from_[pass], stride_ * Tile::kDepth * int(sizeof(T)));
      }
    }
  }

  __device__ __forceinline__ void advance(int tiles) {
    if constexpr (kAlongK) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) move(from_[pass], tiles * Tile::kDepth * int(sizeof(T)));
    }
  }

 private:
  // In place: from plain C++ the compiler keeps the old pointer too, and moves registers.
  static __device__ __forceinline__ void move(const T*& pointer, long long bytes) {
    asm volatile("add.s64 %0, %0, %1;" : "+l"(pointer) : "l"(bytes));
  }

  int to_;
  const T* from_[kPasses];
  long long stride_;
  int column_;  // this and the next: of Major::kMN
  bool wide_;   // the second chunk of a row lies inside
};

// Where a lane points ldmatrix to, for blocks of 16 (mn) x 16 (k) of a warp's kSpan numbers of mn. Lanes with bit
// kHalfBit set have the second half of mn, those with the other of bits 3 and 4 the second half of k.
template <class Tile, int kSpan, int kHalfBit>
class Fragments {
  static constexpr bool kAlongK = Tile::kAlongK;
  static constexpr int kPlaces = kAlongK ? Tile::kDepth / 16 : kSpan / 16;

 public:
  // first: of the warp's numbers of mn, in the tile.
  __device__ __forceinline__ Fragments(uint32_t tile, int first) {
    const int lane = threadIdx.x % 32;
    const int mn = 8 * (lane >> kHalfBit & 1), k = 8 * (lane >> (7 - kHalfBit) & 1), row = lane % 8;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      place_[i] = tile + (kAlongK ? Tile::place(first + mn + row, 2 * i + k / 8)
                                  : Tile::place(k + row, (first + mn) / 8 + 2 * i));
    }
  }

  // The block at numbers 16 * block of the span and 16 * step of k.
  __device__ __forceinline__ void load(uint32_t (&to)[4], uint32_t stage, int block, int step) const {
    const int beyond = 16 * Tile::kRowBytes * (kAlongK ? block : step);
    load_matrices<!kAlongK>(to, place_[kAlongK ? step : block] + stage + beyond);
  }

 private:
  uint32_t place_[kPlaces];
};

}  // namespace mixpert
