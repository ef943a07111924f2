#include "mainloop_sm90a.cuh"
#include "route_grouped_linear.cuh"

namespace mixpert {

using Args = RouteGroupedLinearArgs<__nv_bfloat16>;
using Wgmma = RouteTicketConfig<WarpgroupLoop<__nv_bfloat16>>;

MIXPERT_KERNEL(route_grouped_linear_bf16_wgmma, Wgmma, Args, route_grouped_linear)

}  // namespace mixpert
