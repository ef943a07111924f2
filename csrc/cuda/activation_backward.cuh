// dz[b, t, n]     = dy[b, t, n] * scale[e, n] * act'(pre[b, t, n])            with e = expert[b]
// bias[b, s, n]   = sum over t in chunk s of dz[b, t, n], not yet rounded
// dscale[b, s, n] = sum over t in chunk s of dy[b, t, n] * act(pre[b, t, n])
//
// One block computes chunk s of a tile, tokens s * kChunk and on, x kColumns columns: each warp every kWarps-th token
// of all its columns, a lane kVector of them. A chunk is a constant and the warps' sums are added in order, so the sums
// of a tile depend on nothing but the tile. Grid: B * S * ceil(N / kColumns), S = ceil(T / kChunk), columns fastest.
// Chunks of packed rows have the slots of packed.cuh, R / kChunk + B for B * S; those without rows write nothing.
#pragma once

#include "activations.cuh"
#include "kernel.cuh"
#include "packed.cuh"
#include "types.cuh"

namespace mixpert {

template <typename T>
struct ActivationBackwardArgs {
#define FIELDS(FIELD)                                                                             \
  FIELD(const T*, dy)         /* (B, T, N), or packed rows (R, N) */                              \
  FIELD(const T*, pre)        /* (B, T, N), or null where neither act nor the sum for scale is */ \
  FIELD(const T*, scale)      /* (E, N) or null */                                                \
  FIELD(const int*, expert)   /* (B,) */                                                          \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */                          \
  FIELD(T*, dz)               /* (B, T, N), dense, or null */                                     \
  FIELD(float*, bias)         /* (B, S, N) or (slots, N), or null */                              \
  FIELD(float*, dscale)       /* (B, S, N) or (slots, N), or null */                              \
  FIELD(int, batch)                                                                               \
  FIELD(int, tokens)          /* T, or R */                                                       \
  FIELD(int, width)                                                                               \
  FIELD(int, activation)                                                                          \
  FIELD(int, vectors)         /* whether all rows begin at a multiple of 16 bytes */              \
  FIELD(long long, stride_yb)                                                                     \
  FIELD(long long, stride_yt)                                                                     \
  FIELD(long long, stride_pb)                                                                     \
  FIELD(long long, stride_pt)                                                                     \
  FIELD(long long, stride_s)  /* of bias and dscale, between chunks */
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

template <typename T>
struct ActivationBackwardConfig {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;
  static constexpr int kSharedBytes = 0;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kVector = Vector<T>::kSize;
  static constexpr int kColumns = 32 * kVector;
  static constexpr int kChunk = 64;
  static constexpr void constants(Facts& facts) {
    facts.constant("chunk", kChunk), facts.constant("columns", kColumns);
  }
};

// Which columns a lane holds: neighbours where it can load them at once, else such that a warp's loads are one piece.
template <class Config>
struct LaneColumns {
  static constexpr int kVector = Config::kVector;
  int first, width;
  bool vectors;

  __device__ int column(int j) const {
    const int lane = threadIdx.x % 32;
    return first + (vectors ? lane * kVector + j : lane + 32 * j);
  }
  template <typename T>
  __device__ void load(const T* row, float (&v)[kVector]) const {
    if (vectors) {
      Vector<T> loaded{};
      if (column(0) < width) loaded = *reinterpret_cast<const Vector<T>*>(row + column(0));
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = to_float(loaded.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = column(j) < width ? to_float(row[column(j)]) : 0.0f;
    }
  }
  template <typename T>
  __device__ void store(T* row, const float (&v)[kVector]) const {
    if (vectors) {
      Vector<T> stored;
#pragma unroll
      for (int j = 0; j < kVector; ++j) stored.v[j] = from_float<T>(v[j]);
      if (column(0) < width) *reinterpret_cast<Vector<T>*>(row + column(0)) = stored;
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (column(j) < width) row[column(j)] = from_float<T>(v[j]);
      }
    }
  }

  // out[n] = the sum of the warps' v, in their order. All threads of the block call it.
  __device__ void store_sum(float* out, const float (&v)[kVector]) const {
    constexpr int kRow = 32 + 32 / kVector;  // the padding keeps threads that read neighbours off one bank
    __shared__ float sums[Config::kWarps][kVector * kRow];
    __syncthreads();  // the sums before have been read
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[threadIdx.x / 32][j * kRow + threadIdx.x % 32] = v[j];
    __syncthreads();
    for (int c = threadIdx.x; c < Config::kColumns; c += Config::kThreads) {
      if (first + c >= width) return;
      const int at = vectors ? c % kVector * kRow + c / kVector : c / 32 * kRow + c % 32;
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < Config::kWarps; ++warp) total += sums[warp][at];
      out[first + c] = total;
    }
  }
};

template <class Config, typename T>
__device__ void activation_backward_block(const ActivationBackwardArgs<T>& args) {
  constexpr int kVector = Config::kVector;
  const int blocks = (args.width + Config::kColumns - 1) / Config::kColumns;
  const int chunk = blockIdx.x / blocks;
  const RowBlock at = row_block<Config::kChunk>(args, chunk, [](int tile) { return tile; });
  if (!at.has_rows()) return;
  const long long b = at.first;
  const LaneColumns<Config> columns{int(blockIdx.x % blocks) * Config::kColumns, args.width, args.vectors != 0};

  float scale[kVector];
  if (args.scale) columns.load(args.scale + static_cast<long long>(args.expert[at.tile]) * args.width, scale);
  float dz[kVector], pre[kVector], bias[kVector] = {}, dscale[kVector] = {};
  const int end = min(at.tokens, at.first_row + Config::kChunk);
  for (int t = at.first_row + threadIdx.x / 32; t < end; t += Config::kWarps) {
    columns.load(args.dy + b * args.stride_yb + t * args.stride_yt, dz);
    if (args.pre) columns.load(args.pre + b * args.stride_pb + t * args.stride_pt, pre);
    with_activation(args.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (args.dscale) dscale[j] += dz[j] * activate<kActivation>(pre[j]);
        if (args.scale) dz[j] *= scale[j];
        if (kActivation != kNone) dz[j] *= activate_grad<kActivation>(pre[j]);
      }
    });
#pragma unroll
    for (int j = 0; j < kVector; ++j) bias[j] += dz[j];
    if (args.dz) columns.store(args.dz + (row_number(args, b) + t) * args.width, dz);
  }
  const long long part = chunk * args.stride_s;
  if (args.bias) columns.store_sum(args.bias + part, bias);
  if (args.dscale) columns.store_sum(args.dscale + part, dscale);
}

}  // namespace mixpert
