// LayerNorm of each token with the gain and offset of its tile's expert.
#pragma once

#include "kernel.cuh"
#include "packed.cuh"
#include "rows.cuh"

namespace mixpert {

template <typename T>
struct GroupedLayerNormArgs {
#define FIELDS(FIELD)                   \
  FIELD(const T*, x)         /* (B, T, D), or packed rows (R, D) */ \
  FIELD(const T*, weight)    /* (E, D) */ \
  FIELD(const T*, bias)      /* (E, D) or null */ \
  FIELD(T*, y)               /* (B, T, D) */ \
  FIELD(float*, mean)        /* (B, T) */ \
  FIELD(float*, rstd)        /* (B, T) */ \
  FIELD(const int*, expert)  /* (B,) */ \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */ \
  FIELD(long long, stride_xb)           \
  FIELD(long long, stride_xt)           \
  FIELD(int, batch)                     \
  FIELD(int, tokens)         /* T, or R */ \
  FIELD(int, width)                     \
  FIELD(float, eps)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

// Who normalises a row: one warp keeps it in registers; more serve wider rows, and with kCount = 1 rows whose starts
// are no multiples of 16 bytes.
template <int kCountIn, int kWarpsARowIn>
struct LayerNormConfig {
  static constexpr int kCount = kCountIn;  // 0: as many numbers as 16 bytes hold
  static constexpr int kWarpsARow = kWarpsARowIn;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRows = kThreads / kWarp / kWarpsARow;
  static constexpr void constants(Facts& facts) { facts.constant("rows", kRows), facts.constant("widest", kWidestRow); }
};
using LayerNormRows = LayerNormConfig<0, 1>;
using LayerNormWideRows = LayerNormConfig<0, 4>;
using LayerNormAnyRows = LayerNormConfig<1, 4>;

// y[b, t, d] = (x[b, t, d] - mean[b, t]) rstd[b, t] w[e, d] + c[e, d]     with e = expert[b]
// mean[b, t] = sum_d x[b, t, d] / D,  rstd[b, t] = (sum_d (x[b, t, d] - mean[b, t])^2 / D + eps)^-1/2
//
// One block normalises kRows tokens of one tile. Grid: B * ceil_div(T, kRows). Packed rows are one tile here, of which
// each row looks for its expert. Grid: ceil_div(R, kRows).
template <class Config, typename T>
__device__ __forceinline__ void grouped_layer_norm_block(const GroupedLayerNormArgs<T>& args) {
  constexpr int kRows = Config::kRows, kCount = Config::kCount ? Config::kCount : Vector<T>::kSize;
  const int blocks = (args.tokens + kRows - 1) / kRows;
  int tile = blockIdx.x / blocks;
  const int t = blockIdx.x % blocks * kRows + threadIdx.x / (Config::kWarpsARow * kWarp);
  if (t >= args.tokens) return;  // with more than one warp a row there is one row a block: none of it returns alone
  const long long row = static_cast<long long>(tile) * args.tokens + t;
  const T* x = args.x + tile * args.stride_xb + t * args.stride_xt;
  if (args.cu_seqlens) tile = tile_of_row(args.cu_seqlens, args.batch, t);
  const long long gain = static_cast<long long>(args.expert[tile]) * args.width;
  T* y = args.y + row * args.width;
  const T* c = args.bias ? args.bias + gain : nullptr;
  RowStatistics found;
  if constexpr (Config::kWarpsARow == 1) {
    found = normalise_row(x, [&] { return Affine<T>{args.weight + gain, c}; }, y, args.width, args.eps);
  } else {
    __shared__ float partial[Config::kWarpsARow];
    found = normalise_wide_row<kCount, Config::kWarpsARow>(x, args.weight + gain, c, y, args.width, args.eps, partial);
  }
  if (threadIdx.x % (Config::kWarpsARow * kWarp) == 0) {
    args.mean[row] = found.mean;
    args.rstd[row] = found.rstd;
  }
}

template <typename T>
struct GroupedLayerNormBackwardArgs {
#define FIELDS(FIELD)                       \
  FIELD(const T*, dy)          /* (B, T, D), or packed rows (R, D) */ \
  FIELD(const T*, x)           /* like dy */ \
  FIELD(const T*, weight)      /* (E, D) */ \
  FIELD(const float*, mean)    /* (B, T) */ \
  FIELD(const float*, rstd)    /* (B, T) */ \
  FIELD(T*, dx)                /* (B, T, D) */ \
  FIELD(float*, parts)         /* (B, S, D) of dweight, or (B, S, 2 D): dweight's, then dbias's; (slots, ...) */ \
  FIELD(const int*, expert)    /* (B,) */   \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */ \
  FIELD(long long, stride_gb)               \
  FIELD(long long, stride_gt)               \
  FIELD(long long, stride_xb)               \
  FIELD(long long, stride_xt)               \
  FIELD(int, batch)                         \
  FIELD(int, tokens)           /* T, or R */ \
  FIELD(int, width)                         \
  FIELD(int, has_bias)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

template <int kCountIn>
struct LayerNormBackwardConfig {
  static constexpr int kCount = kCountIn;  // 0: as many numbers as 16 bytes hold; 1: rows that may lie anywhere
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kSharedBytes = 0;
  static constexpr int kTokens = 32;  // a constant, so that a tile's parts do not depend on the batch
  static constexpr void constants(Facts& facts) { facts.constant("tokens", kTokens); }
};
using LayerNormBackwardRows = LayerNormBackwardConfig<0>;
using LayerNormBackwardAnyRows = LayerNormBackwardConfig<1>;

// dx = rstd (u - mean_u - h mean_uh) for one row, by one warp, which reads it twice: from L1 the second time.
template <int kCount, typename T>
__device__ __forceinline__ void layer_norm_dx(const T* dy, const T* x, const T* w, T* dx, float mean, float rstd,
                                              int width) {
  const int first = threadIdx.x % kWarp * kCount;
  float g[kCount], v[kCount], gain[kCount], u[kCount], uh[kCount];
  float sum_u = 0.0f, sum_uh = 0.0f;
#pragma unroll 2
  for (int d = first; d < width; d += kWarp * kCount) {
    load_numbers(dy + d, g), load_numbers(x + d, v), load_numbers(w + d, gain);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      u[j] = __fmul_rn(g[j], gain[j]);
      uh[j] = __fmul_rn(u[j], __fmul_rn(__fsub_rn(v[j], mean), rstd));
    }
    sum_u = __fadd_rn(sum_u, sum_of(u));
    sum_uh = __fadd_rn(sum_uh, sum_of(uh));
  }
  const float mean_u = mean_of(warp_sum(sum_u), width), mean_uh = mean_of(warp_sum(sum_uh), width);
#pragma unroll 2
  for (int d = first; d < width; d += kWarp * kCount) {
    load_numbers(dy + d, g), load_numbers(x + d, v), load_numbers(w + d, gain);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float h = __fmul_rn(__fsub_rn(v[j], mean), rstd);
      const float away = __fmaf_rn(-h, mean_uh, __fsub_rn(__fmul_rn(g[j], gain[j]), mean_u));
      u[j] = __fmul_rn(away, rstd);
    }
    store_numbers(dx + d, u);
  }
}

// dx[b, t, d] = rstd (u[d] - mean_d u - h[d] mean_d (u h))     u = dy w[e],  h = (x - mean) rstd,  e = expert[b]
// parts[b, s, d] = sum_t dy h,  parts[b, s, D + d] = sum_t dy     over the tokens t of chunk s, in their order
//
// One block takes chunk s of one tile, kTokens tokens: first a warp a row for dx, then a thread a few columns for the
// parts, which another kernel adds in batch order. Grid: B * ceil_div(T, kTokens), R / kTokens + B of packed rows.
template <class Config, typename T>
__device__ __forceinline__ void grouped_layer_norm_backward_block(const GroupedLayerNormBackwardArgs<T>& args) {
  constexpr int kCount = Config::kCount ? Config::kCount : Vector<T>::kSize;
  const RowBlock at = row_block<Config::kTokens>(args, blockIdx.x, [](int tile) { return tile; });
  if (!at.has_rows()) return;
  const int begin = at.first_row, end = min(begin + Config::kTokens, at.tokens);
  const T* w = args.weight + static_cast<long long>(args.expert[at.tile]) * args.width;
  const T* dy = args.dy + at.first * args.stride_gb;
  const T* x = args.x + at.first * args.stride_xb;
  const long long row = row_number(args, at.first);
  const float *mean = args.mean + row, *rstd = args.rstd + row;
  for (int t = begin + threadIdx.x / kWarp; t < end; t += Config::kThreads / kWarp) {
    layer_norm_dx<kCount>(dy + t * args.stride_gt, x + t * args.stride_xt, w, args.dx + (row + t) * args.width, mean[t],
                          rstd[t], args.width);
  }
  float* parts = args.parts + static_cast<long long>(blockIdx.x) * (args.has_bias ? 2 : 1) * args.width;
  for (int d = threadIdx.x * kCount; d < args.width; d += Config::kThreads * kCount) {
    float dw[kCount] = {}, dc[kCount] = {}, g[kCount], v[kCount];
#pragma unroll 2
    for (int t = begin; t < end; ++t) {
      load_numbers(dy + t * args.stride_gt + d, g), load_numbers(x + t * args.stride_xt + d, v);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        dw[j] = __fmaf_rn(g[j], __fmul_rn(__fsub_rn(v[j], mean[t]), rstd[t]), dw[j]);
        dc[j] = __fadd_rn(dc[j], g[j]);
      }
    }
    store_floats(parts + d, dw);
    if (args.has_bias) store_floats(parts + args.width + d, dc);
  }
}

}  // namespace mixpert
