// Up to three tensors whose columns lie side by side in another one, and a block of columns that never spans two.
#pragma once

namespace mixpert {

struct Place {
  int tensor;         // which of the three
  int width;          // its columns
  int before;         // columns before it
  int first;          // the block's first column within it
};

__device__ __forceinline__ Place place(int block, int width0, int width1, int width2, int columns) {
  const int blocks0 = (width0 + columns - 1) / columns, blocks1 = (width1 + columns - 1) / columns;
  if (block < blocks0) return {0, width0, 0, block * columns};
  if (block < blocks0 + blocks1) return {1, width1, width0, (block - blocks0) * columns};
  return {2, width2, width0 + width1, (block - blocks0 - blocks1) * columns};
}

// A tensor or another by its number: no array, which would lie in local memory.
template <typename P>
__device__ __forceinline__ P pick(int i, P first, P second, P third) {
  return i == 0 ? first : i == 1 ? second : third;
}

}  // namespace mixpert
