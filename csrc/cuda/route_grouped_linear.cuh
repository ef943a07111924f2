// The router, and each tile's LayerNorm and linear layer, in one launch.
#pragma once

#include "route.cuh"
#include "tickets.cuh"

namespace mixpert {

template <typename T>
struct RouteGroupedLinearArgs : TicketOutputs<T> {
#define FIELDS(FIELD)          \
  MIXPERT_TICKET_FIELDS(FIELD) \
  MIXPERT_ROUTER_FIELDS(FIELD)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS

  __device__ __forceinline__ void publish(int image, int id) const { store_release(ids + image, id); }
};

template <class Loop>
struct RouteTicketConfig : TicketConfig<Loop> {
  static_assert(sizeof(RouteShared) <= Loop::kSharedBytes);
  static constexpr void constants(Facts& facts) {
    TicketConfig<Loop>::constants(facts);
    facts.constant("pool_rows", kPoolRows);
  }
};

// expert = route(x),  h[b, t] = LayerNorm_e(x[b, t]),  y[b, t, i * N + n] = act(h[b, t] . w_i[e, n] + bias_i[e, n])
// with e = expert[b]
//
// Tickets, in this order:
//   I * ceil_div(T, kPoolRows)                                 rows of a base tile, pooled; the last scores the image
//   B * ceil_div(T, kNormRows)                                 rows of h, whose image must have an expert
//   B * ceil_div(T, kBlockM) * weights * ceil_div(N, kBlockN)  blocks of y, in batch order
// Grid: their sum.
template <class Config, typename T>
__device__ __forceinline__ void route_grouped_linear(const RouteGroupedLinearArgs<T>& args) {
  const auto id_of = [&](int tile) { return args.ids + (args.image_of_tile ? args.image_of_tile[tile] : tile); };
  const int pool_blocks = ceil_div(args.tokens, kPoolRows), pools = args.images * pool_blocks;
  const int norms = args.batch * ceil_div(args.tokens, kNormRows);
  const int ticket = draw_ticket(args.ticket);
  if (ticket < pools) {
    const int image = ticket / pool_blocks;
    const int first_row = ticket % pool_blocks * kPoolRows;
    pool_block<Config::kThreads, T>(args, ticket, base_tile_of(args, image), first_row, args.tokens);
    finish_image<Config::kThreads, T>(args, image, *reinterpret_cast<RouteShared*>(dynamic_shared()));
  } else if (ticket < pools + norms) {
    normalise_ticket<Config, T>(args, ticket - pools, [&](int tile) {
      int id = 0;
      if (threadIdx.x % kWarp == 0) id = wait_for(id_of(tile), 1);
      return __shfl_sync(~0u, id, 0) - 1;
    });
  } else {
    multiply_ticket<Config>(args, ticket - pools - norms, [&](int tile) { return __ldcg(id_of(tile)) - 1; });
  }
}

}  // namespace mixpert
