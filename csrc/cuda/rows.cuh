// Rows of numbers and their LayerNorm: what every kernel that normalises shares, so that all agree bit for bit.
//
// A row is summed by one warp: lane l holds numbers (32 i + l) V to (32 i + l) V + V - 1 for i = 0, 1, ..., with V
// numbers to 16 bytes. V neighbours are added pairwise, a lane's sums in the order of i, the lanes' by a butterfly.
// Every product and sum is spelled out, none is left for the compiler to contract: what a row gives depends neither on
// the kernel nor on where the row lies.
#pragma once

#include <type_traits>

#include "types.cuh"

namespace mixpert {

constexpr int kWarp = 32;

// kCount neighbours as they lie in memory: 16 bytes where they fill them (p must then be a multiple of that), else one.
template <int kCount, typename T>
using Packed = std::conditional_t<kCount == 1, T, uint4>;

template <int kCount, typename T>
__device__ __forceinline__ Packed<kCount, T> load_packed(const T* p) {
  static_assert(kCount == 1 || kCount == Vector<T>::kSize);
  return *reinterpret_cast<const Packed<kCount, T>*>(p);
}

template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Packed<kCount, T>& packed, float (&v)[kCount]) {
  const T* numbers = reinterpret_cast<const T*>(&packed);
#pragma unroll
  for (int j = 0; j < kCount; ++j) v[j] = to_float(numbers[j]);
}

template <int kCount, typename T>
__device__ __forceinline__ void load_numbers(const T* p, float (&v)[kCount]) {
  unpack<T>(load_packed<kCount>(p), v);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_numbers(T* p, const float (&v)[kCount]) {
  Packed<kCount, T> packed;
  T* numbers = reinterpret_cast<T*>(&packed);
#pragma unroll
  for (int j = 0; j < kCount; ++j) numbers[j] = from_float<T>(v[j]);
  *reinterpret_cast<Packed<kCount, T>*>(p) = packed;
}

// Partial sums stay in float32: by 16 bytes where p is a multiple of them, as it is unless kCount is 1.
template <int kCount>
__device__ __forceinline__ void store_floats(float* p, const float (&v)[kCount]) {
  if constexpr (kCount == 1) {
    *p = v[0];
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      *reinterpret_cast<float4*>(p + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
    }
  }
}

// Pairwise; kCount is a power of two.
template <int kCount>
__device__ __forceinline__ float sum_of(const float (&v)[kCount]) {
  float sum[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum[j] = v[j];
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sum[j] = __fadd_rn(sum[j], sum[j + half]);
  }
  return sum[0];
}

// The sum of the lanes, in every lane; a butterfly gives all of them the same bits.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

// The sum over the first kWarps warps, in every thread of the block, of which there may be more: they are not counted.
// partial: kWarps floats of shared memory. Two barriers, so that it can be used again at once.
template <int kWarps>
__device__ __forceinline__ float block_sum(float v, float* partial) {
  const int warp = threadIdx.x / kWarp;
  v = warp_sum(v);
  if (warp < kWarps && threadIdx.x % kWarp == 0) partial[warp] = v;
  __syncthreads();
  float sums[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sums[w] = partial[w];
  __syncthreads();
  return sum_of(sums);
}

__device__ __forceinline__ float mean_of(float sum, int width) { return __fdiv_rn(sum, static_cast<float>(width)); }

__device__ __forceinline__ float rstd_of(float squares, int width, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean_of(squares, width), eps)));
}

// (v - mean)^2, summed.
template <int kCount>
__device__ __forceinline__ float squares_of(const float (&v)[kCount], float mean) {
  float squares[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float away = __fsub_rn(v[j], mean);
    squares[j] = __fmul_rn(away, away);
  }
  return sum_of(squares);
}

// y = (v - mean) rstd w + c for kCount neighbours; c may be null.
template <int kCount, typename T>
__device__ __forceinline__ void store_normalised(const float (&v)[kCount], float mean, float rstd, const T* w,
                                                 const T* c, T* y) {
  float gain[kCount], offset[kCount], out[kCount];
  load_numbers(w, gain);
  if (c) load_numbers(c, offset);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float h = __fmul_rn(__fsub_rn(v[j], mean), rstd);
    out[j] = c ? __fmaf_rn(h, gain[j], offset[j]) : __fmul_rn(h, gain[j]);
  }
  store_numbers(y, out);
}

struct RowStatistics {
  float mean;
  float rstd;
};

// The widest row a warp keeps in its registers.
constexpr int kWidestRow = 2048;

template <typename T>
struct Affine {
  const T* w;
  const T* c;  // or null
};

// y = (x - mean) rstd w + c for one row, by one warp; the row stays in registers and is read once. affine() tells w and
// c when mean and rstd are known: it may have to wait for them.
// width <= kWidestRow; x, w, c and y are multiples of 16 bytes, and so is a row.
template <typename T, class F>
__device__ __forceinline__ RowStatistics normalise_row(const T* x, const F& affine, T* y, int width, float eps) {
  constexpr int kVector = Vector<T>::kSize, kStep = kWarp * kVector, kParts = kWidestRow / kStep;
  const int first = threadIdx.x % kWarp * kVector;
  uint4 row[kParts];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int d = i * kStep + first;
    if (d < width) row[i] = load_packed<kVector>(x + d);
  }
  float v[kVector];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (i * kStep + first >= width) continue;
    unpack<T>(row[i], v);
    sum = __fadd_rn(sum, sum_of(v));
  }
  const float mean = mean_of(warp_sum(sum), width);
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (i * kStep + first >= width) continue;
    unpack<T>(row[i], v);
    squares = __fadd_rn(squares, squares_of(v, mean));
  }
  const float rstd = rstd_of(warp_sum(squares), width, eps);
  const Affine<T> of = affine();
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int d = i * kStep + first;
    if (d >= width) continue;
    unpack<T>(row[i], v);
    store_normalised(v, mean, rstd, of.w + d, of.c ? of.c + d : nullptr, y + d);
  }
  return {mean, rstd};
}

// The same by a block of kWarps warps, for rows of any width; they are read three times, from L1 the last two. With
// kCount = 1 rows may lie anywhere. partial: kWarps floats of shared memory.
template <int kCount, int kWarps, typename T>
__device__ __forceinline__ RowStatistics normalise_wide_row(const T* x, const T* w, const T* c, T* y, int width,
                                                            float eps, float* partial) {
  constexpr int kStep = kWarps * kWarp * kCount;
  const int first = threadIdx.x * kCount;
  float sum = 0.0f, squares = 0.0f, v[kCount];
#pragma unroll 4
  for (int d = first; d < width; d += kStep) {
    load_numbers(x + d, v);
    sum = __fadd_rn(sum, sum_of(v));
  }
  const float mean = mean_of(block_sum<kWarps>(sum, partial), width);
#pragma unroll 4
  for (int d = first; d < width; d += kStep) {
    load_numbers(x + d, v);
    squares = __fadd_rn(squares, squares_of(v, mean));
  }
  const float rstd = rstd_of(block_sum<kWarps>(squares, partial), width, eps);
#pragma unroll 4
  for (int d = first; d < width; d += kStep) {
    load_numbers(x + d, v);
    store_normalised(v, mean, rstd, w + d, c ? c + d : nullptr, y + d);
  }
  return {mean, rstd};
}

}  // namespace mixpert
