// Where a tile's rows lie. Tiles of T rows each are x (B, T, D). Packed rows are x (R, D), one tile after the other, of
// any length: tile b is rows cu_seqlens[b] to cu_seqlens[b + 1], which may be none.
//
// Of packed rows the host knows R and B alone, so it counts slots for their row blocks: R / size + B. Those of tile b
// begin at slot cu_seqlens[b] / size + b, which leaves it cu_seqlens[b + 1] / size - cu_seqlens[b] / size + 1 slots, at
// most one more than it has blocks. What a block finds from its slot depends on its own tile alone.
//
// Args of a kernel has cu_seqlens, null without packed rows, batch, and tokens: T, or R. For packed rows the host says
// that tiles are as far apart as rows (stride_b = stride_t), so that a tile begins at Rows::first * stride_b in both.
#pragma once

#include "schedule.cuh"

namespace mixpert {

struct Rows {
  int first;   // the tile's number, or its first row where rows are packed
  int tokens;  // how many rows it has
};

template <class Args>
__device__ __forceinline__ Rows rows_of(const Args& args, int tile) {
  if (!args.cu_seqlens) return {tile, args.tokens};
  const int first = args.cu_seqlens[tile];
  return {first, args.cu_seqlens[tile + 1] - first};
}

// The number of a tile's first row among those of all tiles, for what is dense. first: as of Rows.
template <class Args>
__device__ __forceinline__ long long row_number(const Args& args, long long first) {
  return args.cu_seqlens ? first : first * args.tokens;
}

// The last tile that begin(tile) does not put behind `place`; begin ascends from at most `place` on.
template <class F>
__device__ __forceinline__ int last_tile(int tiles, int place, const F& begin) {
  int low = 0;
  while (tiles - low > 1) {
    const int middle = low + (tiles - low) / 2;
    if (begin(middle) <= place) low = middle;
    else tiles = middle;
  }
  return low;
}

// The tile that a packed row belongs to.
__device__ __forceinline__ int tile_of_row(const int* cu_seqlens, int batch, int row) {
  return last_tile(batch, row, [&](int tile) { return cu_seqlens[tile]; });
}

// The first slot of a tile of packed rows.
template <int kSize>
__device__ __forceinline__ int first_slot(const int* cu_seqlens, int tile) {
  return static_cast<int>(static_cast<unsigned>(cu_seqlens[tile]) / kSize) + tile;
}

// How many row blocks of kSize there are, those without rows included.
template <int kSize, class Args>
__device__ __forceinline__ int count_row_blocks(const Args& args) {
  return args.cu_seqlens ? args.tokens / kSize + args.batch : args.batch * ceil_div(args.tokens, kSize);
}

// A block of up to kSize rows of one tile.
struct RowBlock {
  int tile;
  int first;      // as of Rows
  int first_row;  // within the tile
  int tokens;     // of the tile

  __device__ __forceinline__ bool has_rows() const { return first_row < tokens; }
};

// The number-th row block: in batch order where rows are packed, else tile by tile in the order of tile_at(place).
template <int kSize, class Args, class F>
__device__ __forceinline__ RowBlock row_block(const Args& args, int number, const F& tile_at) {
  if (!args.cu_seqlens) {
    const int blocks = ceil_div(args.tokens, kSize), tile = tile_at(number / blocks);
    return {tile, tile, number % blocks * kSize, args.tokens};
  }
  const int* cu_seqlens = args.cu_seqlens;
  const int tile = last_tile(args.batch, number, [&](int b) { return first_slot<kSize>(cu_seqlens, b); });
  const Rows rows = rows_of(args, tile);
  return {tile, rows.first, (number - first_slot<kSize>(cu_seqlens, tile)) * kSize, rows.tokens};
}

}  // namespace mixpert
