// The shapes of the main loops. All of one element type give the same bits, so a host may choose between them by how
// many blocks there are against the multiprocessors.
//
// large: warps of 64 x 64, where a product needs least from shared memory: 16 matrix instructions to 4 of ldmatrix.
// Three tiles of 128 x 32 an operand are 48 KB and the registers of a thread at most 255, so that every chip from sm_80
// on holds two blocks a multiprocessor: while one waits at a barrier or writes its outputs, the other multiplies. A
// depth of 64 would save a barrier in two and hold one block in the 100 KB of sm_86, 89 and 120.
//
// small: four times as many blocks, for when large ones are fewer than multiprocessors. Its warps do a quarter of the
// products a step, so that a tile is twice as deep, to meet at a barrier as often; 48 KB too, so that two blocks fit in
// 100 KB.
#pragma once

#include "mainloop.cuh"
#include "mainloop_fp32.cuh"

namespace mixpert {

template <typename T, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
struct Loops {
  using Large = TensorCoreLoop<T, 128, 128, 32, 3, 2, 2, 2, kMajorA, kMajorB>;
  using Small = TensorCoreLoop<T, 64, 64, 64, 3, 2, 2, 3, kMajorA, kMajorB>;
};

// On plain fused multiply-adds nothing is gained by 64 x 64 a warp: 8 x 8 numbers a thread, or 8 x 4.
template <Major kMajorA, Major kMajorB>
struct Loops<float, kMajorA, kMajorB> {
  using Large = FmaLoop<128, 128, 16, 3, 4, 2, 8, 1, kMajorA, kMajorB>;
  using Small = FmaLoop<64, 64, 32, 3, 2, 2, 4, 2, kMajorA, kMajorB>;
};

}  // namespace mixpert
