// Routing: pool an image's base tile, score it, decide, sort the tiles by expert. The launch that only routes and the
// one that also normalises and multiplies share this code, and agree bit for bit: every sum has one order, whatever the
// number of threads, and none is left for the compiler to contract.
#pragma once

#include "activations.cuh"
#include "kernel.cuh"
#include "packed.cuh"
#include "rows.cuh"
#include "schedule.cuh"
#include "sync.cuh"

namespace mixpert {

enum Rule { kDirect, kThreshold, kRunnerUp, kVersatile };  // the last two: references of a score difference

// What every kernel that routes takes. The router's parameters are float32 (router_floats) or of the type of x.
#define MIXPERT_ROUTER_FIELDS(FIELD)                                                       \
  FIELD(const long long*, image_of_tile)     /* (B,) or null */                            \
  FIELD(const long long*, base_tile)         /* (I,) or null */                            \
  FIELD(const long long*, forced)            /* (I,) or null */                            \
  FIELD(const void*, router_norm_weight)     /* (D,) */                                    \
  FIELD(const void*, router_norm_bias)       /* (D,) */                                    \
  FIELD(const void*, router_hidden_weight)   /* (H, D) or null */                          \
  FIELD(const void*, router_hidden_bias)     /* (H,) or null */                            \
  FIELD(const void*, router_weight)          /* (E, H or D) */                             \
  FIELD(const void*, router_bias)            /* (E,) */                                    \
  FIELD(float*, scores)                      /* (I, E) */                                  \
  FIELD(float*, pooled)                      /* (I, D) */                                  \
  FIELD(int*, expert)                        /* (B,) */                                    \
  FIELD(int*, order)                         /* (B,) */                                    \
  FIELD(int*, offsets)                       /* (E + 1,) */                                \
  FIELD(float*, partials)                    /* (I, S, D), S = ceil_div(T, kPoolRows); (slots, D) */ \
  FIELD(float*, router_vectors)              /* (I, D + H + E) */                          \
  FIELD(int*, arrived)                       /* (I,) zeros: row blocks pooled */           \
  FIELD(int*, scored)                        /* (1,) zero: images scored */                \
  FIELD(int*, ids)                           /* (I,) zeros, then expert + 1 of an image */ \
  FIELD(int, batch)                                                                        \
  FIELD(int, images)                                                                       \
  FIELD(int, experts)                                                                      \
  FIELD(int, hidden)                                                                       \
  FIELD(int, router_floats)                                                                \
  FIELD(int, rule)                                                                         \
  FIELD(float, threshold)                                                                  \
  FIELD(float, router_eps)

constexpr int kPoolRows = 32;  // rows a block pools: 23 blocks an image of 729 tokens
constexpr int kScorers = 128;  // threads that add up a vector; every kernel that scores has as many
constexpr int kVectors = 2048;  // floats of shared memory for an image's vectors; longer ones lie in global memory

// partial[d] = sum of x[t, d] over `rows` rows, at most kPoolRows: row t adds to sum t % 4, and these pairwise.
template <int kCount, int kThreads, typename T>
__device__ __forceinline__ void pool_columns(const T* x, float* partial, int rows, long long stride_xt, int width) {
  constexpr int kSums = 4, kFlight = 8;  // rows on their way at a time
  for (int d = threadIdx.x * kCount; d < width; d += kThreads * kCount) {
    float sums[kSums][kCount] = {}, v[kCount];
#pragma unroll 2
    for (int r = 0; r < rows; r += kFlight) {
      Packed<kCount, T> row[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (r + j < rows) row[j] = load_packed<kCount>(x + (r + j) * stride_xt + d);
      }
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (r + j >= rows) continue;
        unpack<T>(row[j], v);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[j % kSums][c] = __fadd_rn(sums[j % kSums][c], v[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      v[c] = __fadd_rn(__fadd_rn(sums[0][c], sums[2][c]), __fadd_rn(sums[1][c], sums[3][c]));
    }
    store_floats(partial + d, v);
  }
}

template <class Args>
__device__ __forceinline__ int base_tile_of(const Args& args, int image) {
  return args.base_tile ? static_cast<int>(args.base_tile[image]) : image;
}

// What is pooled for an image: the rows of its base tile, whose sums stand from `first` on in args.partials.
struct Pool {
  long long first;
  int blocks;  // at least one, so that somebody arrives for a tile without rows
  int tokens;
};

template <class Args>
__device__ __forceinline__ Pool pool_of(const Args& args, int image) {
  if (!args.cu_seqlens) {
    const int blocks = ceil_div(args.tokens, kPoolRows);
    return {static_cast<long long>(image) * blocks, blocks, args.tokens};
  }
  const int tile = base_tile_of(args, image), tokens = rows_of(args, tile).tokens;
  return {first_slot<kPoolRows>(args.cu_seqlens, tile), max(ceil_div(tokens, kPoolRows), 1), tokens};
}

// The sum of a block of up to kPoolRows rows, to its place in args.partials. first: of the tile, as of Rows.
template <int kThreads, typename T, class Args>
__device__ __forceinline__ void pool_block(const Args& args, long long place, int first, int first_row, int tokens) {
  constexpr int kVector = Vector<T>::kSize;
  const T* x = args.x + first * args.stride_xb + first_row * args.stride_xt;
  float* partial = args.partials + place * args.width;
  const int rows = min(tokens - first_row, kPoolRows);
  const bool vectors =
      reinterpret_cast<unsigned long long>(x) % 16 == 0 && args.stride_xt % kVector == 0 && args.width % kVector == 0;
  if (vectors) {
    pool_columns<kVector, kThreads>(x, partial, rows, args.stride_xt, args.width);
  } else {
    pool_columns<1, kThreads>(x, partial, rows, args.stride_xt, args.width);
  }
}

// out[n] = f(sum_k weight[n, k] v[k] + bias[n]), f = gelu or nothing: a warp a row, in the order of rows.cuh. Weights
// that lie at no multiple of 16 bytes come one by one, into the same sums.
template <int kThreads, typename P>
__device__ __forceinline__ void router_linear(const float* v, const P* weight, const P* bias, float* out, int rows,
                                              int depth, bool gelu_after) {
  constexpr int kVector = Vector<P>::kSize;
  const int lane = threadIdx.x % kWarp;
  const bool vectors = reinterpret_cast<unsigned long long>(weight) % 16 == 0 && depth % kVector == 0;
  for (int n = threadIdx.x / kWarp; n < rows; n += kThreads / kWarp) {
    const P* row = weight + static_cast<long long>(n) * depth;
    float sum = 0.0f;
#pragma unroll 4
    for (int k = lane * kVector; k < depth; k += kWarp * kVector) {
      float w[kVector];
      if (vectors) {
        load_numbers(row + k, w);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) w[j] = k + j < depth ? to_float(row[k + j]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) w[j] = k + j < depth ? __fmul_rn(w[j], v[k + j]) : 0.0f;
      sum = __fadd_rn(sum, sum_of(w));
    }
    sum = __fadd_rn(warp_sum(sum), to_float(bias[n]));
    if (lane == 0) out[n] = gelu_after ? activate<kGelu>(sum) : sum;
  }
}

// p = mean of the tile's rows, h = LayerNorm(p), logits = W h + a or W gelu(V h + c) + a; returns where the logits lie.
template <int kThreads, typename P, class Args>
__device__ __forceinline__ float* score_image(const Args& args, int image, float* vectors, float* sums) {
  static_assert(kThreads >= kScorers);
  const Pool pool = pool_of(args, image);
  const int width = args.width, blocks = pool.blocks;
  const P* gain = static_cast<const P*>(args.router_norm_weight);
  const P* offset = static_cast<const P*>(args.router_norm_bias);
  const float* partial = args.partials + pool.first * width;
  float *h = vectors, *hidden = h + width, *logits = hidden + args.hidden;
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float part[4] = {};
#pragma unroll 2
    for (int s = 0; s < blocks; s += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s + j < blocks) part[j] = __fadd_rn(part[j], __ldcg(partial + static_cast<long long>(s + j) * width + d));
      }
    }
    h[d] = mean_of(sum_of(part), pool.tokens);
    args.pooled[static_cast<long long>(image) * width + d] = h[d];
  }
  __syncthreads();
  const int first = threadIdx.x < kScorers ? threadIdx.x : width;
  float sum = 0.0f, squares = 0.0f;
  for (int d = first; d < width; d += kScorers) sum = __fadd_rn(sum, h[d]);
  const float mean = mean_of(block_sum<kScorers / kWarp>(sum, sums), width);
  for (int d = first; d < width; d += kScorers) {
    const float away = __fsub_rn(h[d], mean);
    squares = __fadd_rn(squares, __fmul_rn(away, away));
  }
  const float rstd = rstd_of(block_sum<kScorers / kWarp>(squares, sums), width, args.router_eps);
  for (int d = threadIdx.x; d < width; d += kThreads) {
    h[d] = __fmaf_rn(__fmul_rn(__fsub_rn(h[d], mean), rstd), to_float(gain[d]), to_float(offset[d]));
  }
  __syncthreads();
  const P *weight = static_cast<const P*>(args.router_weight), *bias = static_cast<const P*>(args.router_bias);
  if (args.hidden) {
    router_linear<kThreads>(h, static_cast<const P*>(args.router_hidden_weight),
                            static_cast<const P*>(args.router_hidden_bias), hidden, args.hidden, width, true);
    __syncthreads();
    router_linear<kThreads>(hidden, weight, bias, logits, args.experts, args.hidden, false);
  } else {
    router_linear<kThreads>(h, weight, bias, logits, args.experts, width, false);
  }
  __syncthreads();
  return logits;
}

// The best score, the lowest index that has it, and the best among the others.
struct Best {
  float score;
  int expert;
  float second;

  __device__ __forceinline__ void add(const Best& other) {
    const bool theirs = other.score > score || (other.score == score && other.expert < expert);
    second = theirs ? fmaxf(other.second, score) : fmaxf(second, other.score);
    expert = theirs ? other.expert : expert;
    score = theirs ? other.score : score;
  }
};

// scores = softmax(logits), and the expert that they and the rule say: 0 where one is not finite. For one warp.
template <class Args>
__device__ __forceinline__ int decide(const Args& args, int image, float* logits) {
  constexpr float kInfinity = __builtin_huge_valf();
  const int lane = threadIdx.x % kWarp;
  float* scores = args.scores + static_cast<long long>(image) * args.experts;
  float most = -kInfinity, sum = 0.0f, versatile = 0.0f;
  for (int e = lane; e < args.experts; e += kWarp) most = fmaxf(most, logits[e]);
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  for (int e = lane; e < args.experts; e += kWarp) {
    logits[e] = expf(__fsub_rn(logits[e], most));
    sum = __fadd_rn(sum, logits[e]);
  }
  sum = warp_sum(sum);
  bool finite = true;
  Best best{-kInfinity, args.experts, -kInfinity};
  for (int e = lane; e < args.experts; e += kWarp) {
    const float score = __fdiv_rn(logits[e], sum);
    scores[e] = score;
    finite = finite && fabsf(score) < kInfinity;
    if (e == 0) versatile = score;
    best.add({score, e, -kInfinity});
  }
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) {
    best.add({__shfl_xor_sync(~0u, best.score, o), __shfl_xor_sync(~0u, best.expert, o),
              __shfl_xor_sync(~0u, best.second, o)});
  }
  versatile = __shfl_sync(~0u, versatile, 0);
  float least = -kInfinity, found = best.score;
  if (args.rule != kDirect) least = args.threshold;
  if (args.rule == kRunnerUp) found = __fsub_rn(best.score, best.second);
  if (args.rule == kVersatile) found = __fsub_rn(best.score, versatile);
  return __all_sync(~0u, finite) && found >= least ? best.expert : 0;
}

// Write the expert of each tile, the stable order of the tiles by expert, and where each expert's begin. For one block,
// which must have acquired all of args.ids. A warp takes an expert: the tiles of those before it make its offset.
template <int kThreads, class Args>
__device__ __forceinline__ void sort_tiles(const Args& args) {
  const int lane = threadIdx.x % kWarp;
  const auto expert_of = [&](int b) {
    if (b >= args.batch) return -1;
    return __ldcg(args.ids + (args.image_of_tile ? args.image_of_tile[b] : b)) - 1;
  };
  for (int b = threadIdx.x; b < args.batch; b += kThreads) args.expert[b] = expert_of(b);
  const unsigned first = expert_of(lane);  // a small batch is read once
  for (int e = threadIdx.x / kWarp; e <= args.experts; e += kThreads / kWarp) {
    int start = 0;
    for (int b = 0; b < args.batch; b += kWarp) {
      const unsigned id = b ? expert_of(b + lane) : first;
      start += __popc(__ballot_sync(~0u, id < static_cast<unsigned>(e)));
    }
    if (lane == 0) args.offsets[e] = start;
    if (e == args.experts) break;
    for (int b = 0; b < args.batch; b += kWarp) {
      const unsigned id = b ? expert_of(b + lane) : first;
      const unsigned mine = __ballot_sync(~0u, id == static_cast<unsigned>(e));
      if (id == static_cast<unsigned>(e)) args.order[start + __popc(mine & ((1u << lane) - 1))] = b + lane;
      start += __popc(mine);
    }
  }
}

// Shared memory of a block that routes.
struct RouteShared {
  float vectors[kVectors];
  float sums[kScorers / kWarp];
  int said;
};

// What the last row block of an image does: score, decide, and for the last image sort. Others return at once.
template <int kThreads, typename T, class Args>
__device__ __forceinline__ void finish_image(const Args& args, int image, RouteShared& shared) {
  if (!last_to_arrive(args.arrived + image, pool_of(args, image).blocks, &shared.said)) return;
  const int size = args.width + args.hidden + args.experts;
  float* vectors = size <= kVectors ? shared.vectors : args.router_vectors + static_cast<long long>(image) * size;
  float* logits = args.router_floats ? score_image<kThreads, float>(args, image, vectors, shared.sums)
                                     : score_image<kThreads, T>(args, image, vectors, shared.sums);
  int expert = 0;
  if (threadIdx.x < kWarp) expert = decide(args, image, logits);
  if (args.forced) expert = static_cast<int>(args.forced[image]);
  __syncthreads();
  if (threadIdx.x == 0) args.publish(image, expert + 1);
  if (last_to_arrive(args.scored, args.images, &shared.said)) sort_tiles<kThreads>(args);
}

template <typename T>
struct RouteArgs {
#define FIELDS(FIELD)            \
  FIELD(const T*, x) /* (B, T, D), or packed rows (R, D) */ \
  FIELD(const int*, cu_seqlens) /* (B + 1,) for packed rows, or null */ \
  FIELD(long long, stride_xb)    \
  FIELD(long long, stride_xt)    \
  FIELD(int, tokens) /* T, or R */ \
  FIELD(int, width)              \
  MIXPERT_ROUTER_FIELDS(FIELD)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS

  // Nobody waits for an expert here: the last image to be scored reads them.
  __device__ __forceinline__ void publish(int image, int id) const { ids[image] = id; }
};

struct RouteConfig {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kSharedBytes = 0;
  static constexpr void constants(Facts& facts) { facts.constant("pool_rows", kPoolRows); }
};

// The first image from `from` on whose base tile this is; args.images if there is none. All lanes of a warp call it.
template <class Args>
__device__ __forceinline__ int image_of_base(const Args& args, int tile, int from) {
  if (!args.base_tile) return from <= tile ? tile : args.images;
#pragma unroll 1
  for (; from < args.images; from += kWarp) {
    const int image = from + threadIdx.x % kWarp;
    const unsigned found = __ballot_sync(~0u, image < args.images && args.base_tile[image] == tile);
    if (found) return from + __ffs(found) - 1;
  }
  return args.images;
}

// p[i] = mean_t x[base_tile[i], t];  scores[i] = softmax(router(p[i]));  the rule's expert of i serves all its tiles
//
// One block adds kPoolRows rows of one image's base tile. Grid: I * S with S = ceil_div(T, kPoolRows). Nobody waits:
// the last block of an image to arrive scores it, and the last image to be scored writes expert, order and offsets.
//
// Of packed rows, one block adds a row block of any tile, if it is the base tile of an image, or of several. Grid:
// R / kPoolRows + B. A tile without rows has one block all the same, whose mean is none.
template <class Config, typename T>
__device__ __forceinline__ void route_block(const RouteArgs<T>& args) {
  __shared__ RouteShared shared;
  int image, tile, first, first_row, tokens = args.tokens;
  if (args.cu_seqlens) {
    const RowBlock at = row_block<kPoolRows>(args, blockIdx.x, [](int number) { return number; });
    if (at.first_row >= max(at.tokens, 1)) return;
    tile = at.tile, first = at.first, first_row = at.first_row, tokens = at.tokens;
    image = image_of_base(args, tile, 0);
    if (image >= args.images) return;
  } else {
    const int blocks = ceil_div(args.tokens, kPoolRows);
    image = blockIdx.x / blocks, first_row = blockIdx.x % blocks * kPoolRows;
    tile = first = base_tile_of(args, image);
  }
  pool_block<Config::kThreads, T>(args, blockIdx.x, first, first_row, tokens);
#pragma unroll 1
  do {
    finish_image<Config::kThreads, T>(args, image, shared);
    image = args.cu_seqlens ? image_of_base(args, tile, image + 1) : args.images;
  } while (image < args.images);
}

}  // namespace mixpert
