#include "route_grouped_linear.cuh"

namespace mixpert {

using Args = RouteGroupedLinearArgs<__nv_bfloat16>;
using Large = RouteTicketConfig<Loops<__nv_bfloat16>::Large>;
using Small = RouteTicketConfig<Loops<__nv_bfloat16>::Small>;

MIXPERT_KERNEL(route_grouped_linear_bf16_large, Large, Args, route_grouped_linear)
MIXPERT_KERNEL(route_grouped_linear_bf16_small, Small, Args, route_grouped_linear)

}  // namespace mixpert
