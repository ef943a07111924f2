// A tile's LayerNorm and linear layer in one launch, for a routing that is given.
#pragma once

#include "tickets.cuh"

namespace mixpert {

template <typename T>
struct NormGroupedLinearArgs : TicketOutputs<T> {
#define FIELDS(FIELD)                 \
  MIXPERT_TICKET_FIELDS(FIELD)        \
  FIELD(const int*, expert) /* (B,) */ \
  FIELD(int, batch)
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

// h[b, t] = LayerNorm_e(x[b, t]),  y[b, t, i * N + n] = act(h[b, t] . w_i[e, n] + bias_i[e, n])     with e = expert[b]
//
// Tickets, in this order:
//   B * ceil_div(T, kNormRows)                                             rows of h
//   B * ceil_div(T, kBlockM) * weights * ceil_div(N, kBlockN)              blocks of y, in batch order
// Grid: their sum.
template <class Config, typename T>
__device__ __forceinline__ void norm_grouped_linear(const NormGroupedLinearArgs<T>& args) {
  const auto expert_of = [&](int tile) { return args.expert[tile]; };
  const int norms = args.batch * ceil_div(args.tokens, kNormRows);
  const int ticket = draw_ticket(args.ticket);
  if (ticket < norms) {
    normalise_ticket<Config, T>(args, ticket, expert_of);
  } else {
    multiply_ticket<Config>(args, ticket - norms, expert_of);
  }
}

}  // namespace mixpert
