// How blocks of one launch pass data on: counters raised with release and read with acquire.
//
// A release speaks for the stores of its own thread, and for those of others only behind a barrier: so every one here
// is behind __syncthreads(), and the barrier that follows an acquire lets the whole block see what it saw. What is read
// behind an acquire was written in this launch: plain loads or cp.async, never the read-only path nor TMA.
#pragma once

namespace mixpert {

__device__ __forceinline__ int add_acq_rel(int* counter, int n) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(n)
               : "memory");
  return before;
}

__device__ __forceinline__ void add_release(int* counter, int n) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)), "r"(n) : "memory");
}

__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* place, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(place)), "r"(value) : "memory");
}

// Polls until the counter is at least that high, and returns it. What waits so long that nothing will come, a minute or
// so, traps: a broken launch is an error and not a machine that hangs.
__device__ __forceinline__ int wait_for(const int* counter, int least) {
  constexpr int kPolls = 1 << 26;
  int value = load_acquire(counter);
  for (int polls = 1; value < least; ++polls) {
    if (polls == kPolls) __trap();
    __nanosleep(32);
    value = load_acquire(counter);
  }
  return value;
}

// Whether this block is the last of `blocks` to arrive, in all its threads. It then sees what all of them wrote.
// said: of shared memory.
__device__ __forceinline__ bool last_to_arrive(int* counter, int blocks, int* said) {
  __syncthreads();
  if (threadIdx.x == 0) *said = add_acq_rel(counter, 1) == blocks - 1;
  __syncthreads();
  return *said;
}

}  // namespace mixpert
