// Up to three tensors whose columns lie side by side in another one, and a block of columns that never spans two.
#pragma once

namespace mixpert {

struct Columns {
  int tensor;  // which of the three
  int width;   // its columns
  int before;  // columns before it
  int first;   // the block's first column within it
};

__device__ __forceinline__ Columns columns_of(int block, int width0, int width1, int width2, int size) {
  const int blocks0 = (width0 + size - 1) / size, blocks1 = (width1 + size - 1) / size;
  if (block < blocks0) return {0, width0, 0, block * size};
  if (block < blocks0 + blocks1) return {1, width1, width0, (block - blocks0) * size};
  return {2, width2, width0 + width1, (block - blocks0 - blocks1) * size};
}

}  // namespace mixpert
