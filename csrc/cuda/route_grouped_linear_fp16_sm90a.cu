#include "mainloop_sm90a.cuh"
#include "route_grouped_linear.cuh"

namespace mixpert {

using Args = RouteGroupedLinearArgs<__half>;
using Wgmma = RouteTicketConfig<WarpgroupLoop<__half>>;

MIXPERT_KERNEL(route_grouped_linear_fp16_wgmma, Wgmma, Args, route_grouped_linear)

}  // namespace mixpert
