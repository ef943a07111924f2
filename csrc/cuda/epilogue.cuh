// From accumulators to outputs:
//
//   z = acc + bias        pre = z rounded
//   y = scale * act(z) + residual, in float32, rounded once
//
// Accumulators lie scattered over the lanes, so each warp passes them through shared memory in strips of 16 rows: a
// loop writes a strip in its own layout (Loop::store_strip), and here lanes read it by rows, so that residual, pre and
// y are full vectors of 16 bytes. Only the warp's own lanes meet at a strip.
#pragma once

#include "activations.cuh"
#include "copy.cuh"
#include "types.cuh"

namespace mixpert {

template <int kColumns_>
struct Strip {
  static constexpr int kRows = 16, kColumns = kColumns_;
  // Rows begin 8 banks further: four rows of a fragment, 32 bytes of each, are written at once.
  static constexpr int kRowBytes = 4 * (kColumns + 8);
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kColumns % 32 == 0);

  // Pairs of 16 bytes are swapped in every other row and every other 128 bytes: lanes that read 8 numbers each do so in
  // two halves, all first halves at once.
  static __device__ __forceinline__ int place(int row, int column) {
    const int chunk = column / 4;
    return row * kRowBytes + 16 * (chunk ^ ((chunk >> 3 ^ row) & 1)) + 4 * (column % 4);
  }

  static __device__ __forceinline__ float* at(unsigned char* strip, int row, int column) {
    return reinterpret_cast<float*>(strip + place(row, column));
  }

  // Four numbers of a row from a multiple of four on.
  static __device__ __forceinline__ float4& four(unsigned char* strip, int row, int column) {
    return *reinterpret_cast<float4*>(strip + place(row, column));
  }
};

// What a block writes, from its first row and column on.
template <typename T>
struct Outputs {
  T* y;
  T* pre;             // or null; laid out like y, as is
  const T* residual;  // or null
  const T* bias;      // or null
  const T* scale;     // or null
  long long stride;   // of y, from row to row
  int rows, columns;  // that there are
  int activation;
  bool vectors;       // all rows are vectors of 16 bytes, aligned and whole
};

// Writes a warp's strips, all of which have the same columns.
template <typename T, class Strip>
class StripWriter {
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr int kLanes = Strip::kColumns / kSize;       // that write a row
  static constexpr int kPasses = Strip::kRows * kLanes / 32;   // rows of a lane
  static constexpr int kBatch = sizeof(T) == 4 ? 4 : 2;        // of which are in flight
  static_assert(kPasses % kBatch == 0);

 public:
  __device__ __forceinline__ StripWriter(const Outputs<T>& out, int first_column)
      : out_(out), column_(first_column + thread_anew() % 32 % kLanes * kSize) {
    if (!out.vectors) {
      column_ = first_column + thread_anew() % 32;
      return;
    }
    if (out.bias && column_ < out.columns) read(bias_, out.bias + column_);
    if (out.scale && column_ < out.columns) read(scale_, out.scale + column_);
  }

  // first_row: of the strip, in the block.
  __device__ __forceinline__ void write(unsigned char* strip, int first_row) const {
    if (out_.vectors) {
      write_vectors(strip, first_row);
    } else {
      write_numbers(strip, first_row);
    }
  }

 private:
  static __device__ __forceinline__ void read(float (&to)[kSize], const T* from) {
    const auto numbers = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
    for (int i = 0; i < kSize; ++i) to[i] = to_float(numbers.v[i]);
  }

  template <int kCount>
  static __device__ __forceinline__ void store(T* to, const float (&from)[kCount], int first) {
    Vector<T> numbers;
#pragma unroll
    for (int i = 0; i < kSize; ++i) numbers.v[i] = from_float<T>(from[first + i]);
    *reinterpret_cast<Vector<T>*>(to) = numbers;
  }

  __device__ __forceinline__ void write_vectors(unsigned char* strip, int first_row) const {
    const int lane = thread_anew() % 32, first = lane / kLanes, in_strip = lane % kLanes * kSize;
    if (column_ >= out_.columns) return;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; pass += kBatch) {
      float z[kBatch * kSize];
      Vector<T> residual[kBatch];
      bool inside[kBatch];
      long long place[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + (pass + i) * (32 / kLanes);
        inside[i] = first_row + row < out_.rows;
        place[i] = (first_row + row) * out_.stride + column_;
        if (out_.residual && inside[i]) residual[i] = *reinterpret_cast<const Vector<T>*>(out_.residual + place[i]);
#pragma unroll
        for (int j = 0; j < kSize; j += 4) {
          const float4 four = Strip::four(strip, row, in_strip + j);
          z[i * kSize + j] = four.x, z[i * kSize + j + 1] = four.y;
          z[i * kSize + j + 2] = four.z, z[i * kSize + j + 3] = four.w;
        }
      }
      if (out_.bias) {
#pragma unroll
        for (int i = 0; i < kBatch * kSize; ++i) z[i] = __fadd_rn(z[i], bias_[i % kSize]);
      }
      if (out_.pre) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (inside[i]) store(out_.pre + place[i], z, i * kSize);
        }
      }
      activate(z, out_.activation);
      if (out_.scale) {
#pragma unroll
        for (int i = 0; i < kBatch * kSize; ++i) z[i] = __fmul_rn(z[i], scale_[i % kSize]);
      }
      if (out_.residual) {
#pragma unroll
        for (int i = 0; i < kBatch * kSize; ++i) {
          if (inside[i / kSize]) z[i] = __fadd_rn(z[i], to_float(residual[i / kSize].v[i % kSize]));
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (inside[i]) store(out_.y + place[i], z, i * kSize);
      }
    }
  }

  // The same a number at a time, for outputs that no vectors fit.
  __device__ __forceinline__ void write_numbers(unsigned char* strip, int first_row) const {
    const int rows = min(Strip::kRows, out_.rows - first_row);
#pragma unroll 1
    for (int beyond = 0; beyond < Strip::kColumns; beyond += 32) {
      const int column = column_ + beyond;
      if (column >= out_.columns) return;
      const float bias = out_.bias ? to_float(out_.bias[column]) : 0.0f;
      const float scale = out_.scale ? to_float(out_.scale[column]) : 1.0f;
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        const long long place = (first_row + row) * out_.stride + column;
        float z[1] = {*Strip::at(strip, row, thread_anew() % 32 + beyond)};
        if (out_.bias) z[0] = __fadd_rn(z[0], bias);
        if (out_.pre) out_.pre[place] = from_float<T>(z[0]);
        activate(z, out_.activation);
        if (out_.scale) z[0] = __fmul_rn(z[0], scale);
        if (out_.residual) z[0] = __fadd_rn(z[0], to_float(out_.residual[place]));
        out_.y[place] = from_float<T>(z[0]);
      }
    }
  }

  const Outputs<T>& out_;
  int column_;
  float bias_[kSize], scale_[kSize];
};

// Writes a block from the accumulators of a loop. All warps call this with shared memory that nobody else uses.
template <class Loop, typename T>
__device__ __forceinline__ void write_block(const typename Loop::Accumulators& acc, const Outputs<T>& out,
                                            unsigned char* shared) {
  unsigned char* strip = shared + thread_anew() / 32 * Loop::WarpStrip::kBytes;
  const StripWriter<T, typename Loop::WarpStrip> writer(out, Loop::warp_column());
#pragma unroll 1
  for (int i = 0; i < Loop::kStrips; ++i) {
    Loop::store_strip(acc, i, strip);
    __syncwarp();
    writer.write(strip, Loop::warp_row() + i * Loop::WarpStrip::kRows);
    __syncwarp();
  }
}

}  // namespace mixpert
