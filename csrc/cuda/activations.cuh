// The five activations and their derivatives, in float32.
#pragma once

#include <type_traits>

namespace mixpert {

// In the order of mixpert_kernels.backends.reference.activations.ACTIVATIONS.
enum Activation : int { kNone, kGelu, kGeluTanh, kQuickGelu, kRelu };

// 1 - 2 / (exp(2z) + 1): exact limits at both ends, where exp overflows to inf or underflows to 0.
__device__ __forceinline__ float tanh_of(float z) { return 1.0f - __fdividef(2.0f, __expf(2.0f * z) + 1.0f); }

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <Activation kActivation>
__device__ __forceinline__ float activate(float z) {
  if constexpr (kActivation == kGelu) return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
  if constexpr (kActivation == kGeluTanh) {
    return 0.5f * z * (1.0f + tanh_of(0.7978845608028654f * (z + 0.044715f * z * z * z)));
  }
  if constexpr (kActivation == kQuickGelu) return z * sigmoid(1.702f * z);
  if constexpr (kActivation == kRelu) return z < 0.0f ? 0.0f : z;  // NaN stays
  return z;
}

// act'(z); relu'(0) = 0.
template <Activation kActivation>
__device__ __forceinline__ float activate_grad(float z) {
  if constexpr (kActivation == kGelu) {
    const float density = __expf(-0.5f * z * z) * 0.3989422804014327f;
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f)) + z * density;
  }
  if constexpr (kActivation == kGeluTanh) {
    const float u = 0.7978845608028654f * (z + 0.044715f * z * z * z);
    const float du = 0.7978845608028654f * (1.0f + 0.134145f * z * z);
    // With q = exp(-2 |u|), 1 - tanh(u)^2 = 4 q / (1 + q)^2: no digit is lost where tanh is near -1 or 1.
    const float q = __expf(-2.0f * fabsf(u));
    const float p = __fdividef(1.0f, 1.0f + q);
    return (u < 0.0f ? q * p : p) + 2.0f * z * du * q * p * p;
  }
  if constexpr (kActivation == kQuickGelu) {
    const float s = sigmoid(1.702f * z);
    return s + 1.702f * z * s * (1.0f - s);
  }
  if constexpr (kActivation == kRelu) return z > 0.0f ? 1.0f : 0.0f;
  return 1.0f;
}

template <Activation kActivation>
using ActivationTag = std::integral_constant<Activation, kActivation>;

// Calls f with the tag of the activation: one switch around as many numbers as f handles.
template <class F>
__device__ __forceinline__ void with_activation(int activation, const F& f) {
  switch (activation) {
    case kGelu: return f(ActivationTag<kGelu>());
    case kGeluTanh: return f(ActivationTag<kGeluTanh>());
    case kQuickGelu: return f(ActivationTag<kQuickGelu>());
    case kRelu: return f(ActivationTag<kRelu>());
    default: return f(ActivationTag<kNone>());
  }
}

// act(z) for all of z.
template <int kCount>
__device__ __forceinline__ void activate(float (&z)[kCount], int activation) {
  with_activation(activation, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = activate<decltype(tag)::value>(z[i]);
  });
}

// d[i] times act'(z[i]) for all of z.
template <int kCount>
__device__ __forceinline__ void multiply_by_grad(float (&d)[kCount], const float (&z)[kCount], int activation) {
  with_activation(activation, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) d[i] *= activate_grad<decltype(tag)::value>(z[i]);
  });
}

}  // namespace mixpert
