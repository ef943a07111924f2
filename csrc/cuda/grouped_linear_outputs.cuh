// Where a block of grouped_linear's outputs lies, with what is added and multiplied there.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"
#include "schedule.cuh"

namespace mixpert {

// Args has the fields of GroupedLinearArgs after the weights; i: which weight.
template <typename T, class Args>
__device__ __forceinline__ Outputs<T> outputs_of(const Args& args, int i, int tile, long long expert, int first_row,
                                                 int first_column) {
  const int width = args.weights * args.columns, column = i * args.columns + first_column;
  const Rows rows = rows_of(args, tile);
  const long long place = rows.first * args.stride_yb + first_row * args.stride_yt + column;
  const T* bias = pick(i, args.b0, args.b1, args.b2);
  return {args.y + place,
          args.pre ? args.pre + place : nullptr,
          args.residual ? args.residual + place : nullptr,
          bias ? bias + expert * args.columns + first_column : nullptr,
          args.scale ? args.scale + expert * width + column : nullptr,
          args.stride_yt,
          rows.tokens - first_row,
          args.columns - first_column,
          args.activation,
          args.vectors != 0};
}

}  // namespace mixpert
