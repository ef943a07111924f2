// What sm_90a has and earlier chips lack, each a thin wrapper around one PTX instruction: mbarriers, TMA loads, wgmma,
// registers moved between warpgroups.
#pragma once

#include "copy.cuh"
#include "facts.h"

namespace mixpert::hopper {

constexpr int kWarpgroup = 128;      // threads that issue a wgmma together
constexpr int kSwizzleAlign = 1024;  // of shared memory in 128-byte swizzle, which repeats every 8 rows of 128 bytes

// Whether this is the one thread of its warp that acts for it; all of the warp must ask. The compiler knows this test:
// what follows it runs once, without a loop over threads.
__device__ __forceinline__ bool elected() {
  uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen));
  return chosen;
}

// The thread's warp and warpgroup, as numbers that the compiler knows to be the same in the whole warp.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// mbarriers. A phase ends when `count` threads have arrived and all bytes expected are there; phases have parities 0, 1,
// 0, ..., and waiting for the parity of the phase before the first one returns at once.

__device__ __forceinline__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes init visible to TMA. Other threads need a barrier of the block as well.
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns when the phase of this parity has ended; what its arrivals did before is seen after.
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// TMA.

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the map's box that begins at (outer, row, column) to shared memory, 0 outside the tensor, and counts the box's
// bytes at the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, int outer, int row, int column,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(outer), "r"(barrier)
      : "memory");
}

// wgmma: the warpgroup multiplies A (64 x 16) by B (128 x 16)^T, both straight from shared memory.

// The low word of the descriptor of an operand whose rows are 64 numbers along k, in 128-byte swizzle; it counts in units of
// 16 bytes. Its first row begins at a multiple of 1024 bytes, plus where in the row the 16 columns begin.
constexpr int kUnit = 16;
__device__ __forceinline__ uint32_t descriptor(uint32_t address) { return 1u << 16 | address / kUnit; }

// The high word: groups of 8 rows lie 1024 bytes apart; 128-byte swizzle.
constexpr uint32_t kDescriptorHigh = 1u << 30 | kSwizzleAlign / kUnit;

// Orders the registers' earlier uses, and shared memory seen by this thread, before the wgmmas that follow.
__device__ __forceinline__ void fence_operands() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most PENDING of the newest groups still run.
template <int PENDING>
__device__ __forceinline__ void wait_groups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A thread's part of the 64 x 128 accumulators. With g = lane / 4, t = lane % 4, warp w of the warpgroup:
// v[4 * j + 2 * h + i] is row 16 * w + 8 * h + g, column 8 * j + 2 * t + i.
struct Accumulators {
  float v[64];

  // No use of the registers moves above this.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(v[i])::"memory");
  }
};

// Writes the columns from `first` on of the warp's 16 rows to its strip (epilogue.cuh). `first` may vary at run time:
// registers cannot be indexed, code can.
template <class Strip>
__device__ __forceinline__ void store_strip(const Accumulators& acc, int first, unsigned char* strip) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 128; j += 8) {
    if (j / Strip::kColumns * Strip::kColumns != first) continue;
    const float* v = acc.v + j / 2;
    *reinterpret_cast<float2*>(Strip::at(strip, row, column + j % Strip::kColumns)) = {v[0], v[1]};
    *reinterpret_cast<float2*>(Strip::at(strip, row + 8, column + j % Strip::kColumns)) = {v[2], v[3]};
  }
}

#define MIXPERT_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MIXPERT_WGMMA(type)                                                                                          \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred p;\n"                                                                                              \
      ".reg .b64 a, b;\n"                                                                                            \
      "setp.ne.b32 p, %66, 0;\n"                                                                                     \
      "mov.b64 a, {%64, %67};\n"                                                                                     \
      "mov.b64 b, {%65, %67};\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "        \
      "a, b, p, 1, 1, 0, 0;\n"                                                                                       \
      "}"                                                                                                            \
      : MIXPERT_D8(d.v, 0), MIXPERT_D8(d.v, 8), MIXPERT_D8(d.v, 16), MIXPERT_D8(d.v, 24), MIXPERT_D8(d.v, 32),       \
        MIXPERT_D8(d.v, 40), MIXPERT_D8(d.v, 48), MIXPERT_D8(d.v, 56)                                                \
      : "r"(a), "r"(b), "r"(accumulate), "n"(kDescriptorHigh))

// d = A B^T + (accumulate ? d : 0); a and b are low words.
template <typename T>
__device__ __forceinline__ void multiply(Accumulators& d, uint32_t a, uint32_t b, int accumulate);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(Accumulators& d, uint32_t a, uint32_t b, int accumulate) {
  MIXPERT_WGMMA("bf16");
}
template <>
__device__ __forceinline__ void multiply<__half>(Accumulators& d, uint32_t a, uint32_t b, int accumulate) {
  MIXPERT_WGMMA("f16");
}
#undef MIXPERT_WGMMA
#undef MIXPERT_D8

// Registers a thread of this warpgroup has from here on; all of its warps must call it.
template <int REGISTERS>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace mixpert::hopper
