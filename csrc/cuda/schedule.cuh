// Which block of the output a number stands for.
#pragma once

namespace mixpert {

// Row blocks that are visited with all column blocks before the next ones: blocks that run together share this many
// blocks of features and few of weights, and both stay in L2.
constexpr int kGroup = 8;

struct Place {
  int row;
  int column;
};

__device__ __forceinline__ Place locate(int block, int row_blocks, int column_blocks) {
  const int group = block / (kGroup * column_blocks), within = block % (kGroup * column_blocks);
  const int height = min(row_blocks - group * kGroup, kGroup);
  return {group * kGroup + within % height, within / height};
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The i-th of up to three pointers: query, key and value are three weights of one launch.
template <typename T>
__device__ __forceinline__ T* pick(int i, T* first, T* second, T* third) {
  return i == 0 ? first : i == 1 ? second : third;
}

}  // namespace mixpert
