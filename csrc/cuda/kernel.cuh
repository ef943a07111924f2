// How a kernel is declared.
//
//   template <typename T>
//   struct CopyArgs {
//   #define FIELDS(FIELD) FIELD(const T*, x) FIELD(T*, y) FIELD(int, n)   // one a line, with its shape
//     MIXPERT_FIELDS(FIELDS)
//   #undef FIELDS
//   };
//
//   struct CopyConfig {                              // all are compile-time facts that the host asks for by name
//     static constexpr int kThreads = 128;
//     static constexpr int kMinBlocks = 2;           // blocks a multiprocessor must hold: the register budget
//     static constexpr int kSharedBytes = 0;         // dynamic
//     static constexpr void constants(mixpert::Facts& facts) { facts.constant("block", 512); }
//   };
//
//   template <class Config, typename T>
//   __device__ void copy_block(const CopyArgs<T>& args) { ... }
//
//   MIXPERT_KERNEL(copy_bf16, CopyConfig, CopyArgs<__nv_bfloat16>, copy_block)
//
// The grid has one dimension, the arguments are one struct in the constant bank, and nothing else is known to the launcher.
#pragma once

#include <cuda_runtime.h>

#include "facts.h"
#include "registry.h"

#define MIXPERT_MEMBER(type, name) type name;
#define MIXPERT_FIELD(type, name) facts.field<type>(#name);
#define MIXPERT_FIELDS(FIELDS) \
  FIELDS(MIXPERT_MEMBER)       \
  static constexpr void fields(mixpert::Facts& facts) { FIELDS(MIXPERT_FIELD) }

// A name is its entry in the PTX; types with commas need an alias. The facts are no "C" variable: nvcc's host code looks
// for those outside of all namespaces.
#define MIXPERT_KERNEL(name, Config, Args, body)                                                                  \
  extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)                              \
      name(const __grid_constant__ Args args) {                                                                   \
    body<Config>(args);                                                                                           \
  }                                                                                                               \
  __device__ mixpert::Facts name##_facts = mixpert::facts<Config, Args>();                                        \
  static const mixpert::Registration name##_registration{#name, reinterpret_cast<const void*>(name), sizeof(Args), \
                                                         mixpert::facts<Config, Args>(), Config::kThreads,        \
                                                         Config::kSharedBytes};
