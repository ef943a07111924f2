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
  // ldmatrix reads at once nor the eight of one row that eight threads write share a bank. Rows of 64 bytes lie two to a
  // line of banks. Threads of the float32 loop read every fourth row.
  static constexpr int kRowsALine = kChunks < 8 ? 8 / kChunks : 1;
  static constexpr int kStep = sizeof(T) == 4 ? 4 : kRowsALine;
  static constexpr int kTurns = kChunks < 8 ? kChunks : 8;
  static_assert(kChunks % 4 == 0 && kBytes % 128 == 0);

  static __device__ __forceinline__ int turn(int row) { return row / kStep % kTurns; }
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + 16 * (chunk ^ turn(row));
  }
};

// Copies the tiles of an operand along k, one after the other. Neighbouring threads copy neighbouring chunks of a row, so
// that whole sectors are read. Past the operand's mn the last chunk is copied again, as nothing is made of it; past k the
// tile is filled with zeros. So a step has no mask but on k.
//
// Rows must start at multiples of 16 bytes, and their length (k or mn) be one.
template <class Tile>
class Loader {
  using T = typename Tile::T;
  static constexpr int kLanes = Tile::kChunks < 8 ? Tile::kChunks : 8;     // that copy a row
  static constexpr int kAcross = Tile::kChunks / kLanes;                   // chunks a thread copies of a row
  static constexpr int kRowStep = Tile::kThreads / kLanes;
  static constexpr int kPasses = Tile::kRows / kRowStep;                   // rows a thread copies of
  static constexpr bool kAlongK = Tile::kAlongK;
  static_assert(Tile::kRows % kRowStep == 0 && kRowStep % (Tile::kStep * Tile::kTurns) == 0);
  static_assert(!kAlongK || kAcross == 1);

 public:
  // first: element (0, 0) of the block. stride: elements from row to row. available: of mn, from the block's start on.
  // depth: of k.
  __device__ __forceinline__ Loader(const T* first, long long stride, int available, int depth) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    to_ = Tile::place(row, chunk);
    if constexpr (kAlongK) {
      left_ = depth - chunk * Tile::kNumbers;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        from_[pass] = first + min(row + pass * kRowStep, available - 1) * stride + chunk * Tile::kNumbers;
      }
    } else {
      start(first, depth);
      step_ = stride * Tile::kDepth;
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const int inside = min(chunk + across * kLanes, (available - 1) / Tile::kNumbers);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          offset_[pass][across] = unsigned((row + pass * kRowStep) * stride / Tile::kNumbers) + inside;
        }
      }
    }
  }

  // Goes on with other rows of the same stride and columns (Major::kMN).
  __device__ __forceinline__ void start(const T* first, int depth) {
    static_assert(!kAlongK);
    from_[0] = first;
    left_ = depth - int(threadIdx.x) / kLanes;
  }

  // Copies to `tile` the tile that is `ahead` of those that advance() has passed. Each is copied once, in order; with a
  // constant `ahead` it costs no addition.
  __device__ __forceinline__ void load(uint32_t tile, int ahead) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t to = tile + to_ + pass * kRowStep * Tile::kRowBytes;
      if constexpr (kAlongK) {
        copy_async(to, from_[pass] + ahead * Tile::kDepth, left_ > ahead * Tile::kDepth);
      } else {
#pragma unroll
        for (int across = 0; across < kAcross; ++across) {
          copy_async(to + across * 16 * kLanes, chunk_at(from_[0], offset_[pass][across]),
                     left_ > ahead * Tile::kDepth + pass * kRowStep);
        }
      }
    }
    if constexpr (!kAlongK) from_[0] += step_;
  }

  __device__ __forceinline__ void advance(int tiles) {
    left_ -= tiles * Tile::kDepth;
    if constexpr (kAlongK) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) from_[pass] += tiles * Tile::kDepth;
    }
  }

 private:
  // One wide multiply-add; from plain C++ the compiler makes 64-bit offsets, and two additions of each.
  static __device__ __forceinline__ const void* chunk_at(const T* base, unsigned chunks) {
    const void* address;
    asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(address) : "r"(chunks), "l"(base));
    return address;
  }

  int to_, left_;  // left_: numbers of k from the thread's first on
  const T* from_[kAlongK ? kPasses : 1];
  unsigned offset_[kAlongK ? 1 : kPasses][kAlongK ? 1 : kAcross];  // chunks
  long long step_;
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
