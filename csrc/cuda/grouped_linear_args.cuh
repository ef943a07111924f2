// What the kernels of grouped_linear take.
#pragma once

#include "kernel.cuh"

namespace mixpert {

template <typename T>
struct GroupedLinearArgs {
#define FIELDS(FIELD)                                                          \
  FIELD(const T*, x)         /* (B, T, K), or packed rows (R, K) */            \
  FIELD(const T*, w0)        /* (E, N, K) */                                   \
  FIELD(const T*, w1)        /* (E, N, K) or null */                           \
  FIELD(const T*, w2)                                                          \
  FIELD(const T*, b0)        /* (E, N) or null, the bias of w0 */              \
  FIELD(const T*, b1)                                                          \
  FIELD(const T*, b2)                                                          \
  FIELD(const T*, scale)     /* (E, width) or null; width = weights * N */     \
  FIELD(const T*, residual)  /* (B, T, width) or null, laid out like y */      \
  FIELD(T*, y)               /* (B, T, width) */                               \
  FIELD(T*, pre)             /* (B, T, width) or null, laid out like y */      \
  FIELD(const int*, expert)  /* (B,) */                                        \
  FIELD(const int*, order)   /* (B,) */                                        \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */       \
  FIELD(long long, stride_xb)                                                  \
  FIELD(long long, stride_xt)                                                  \
  FIELD(long long, stride_we)                                                  \
  FIELD(long long, stride_wn)                                                  \
  FIELD(long long, stride_yb)                                                  \
  FIELD(long long, stride_yt)                                                  \
  FIELD(int, batch)                                                            \
  FIELD(int, tokens)         /* T, or R */                                     \
  FIELD(int, columns)        /* N */                                           \
  FIELD(int, depth)          /* K */                                           \
  FIELD(int, weights)                                                          \
  FIELD(int, activation)                                                       \
  FIELD(int, vectors)        /* outputs, bias and scale are aligned vectors */
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

}  // namespace mixpert
