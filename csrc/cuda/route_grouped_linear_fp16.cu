#include "route_grouped_linear.cuh"

namespace mixpert {

using Args = RouteGroupedLinearArgs<__half>;
using Large = RouteTicketConfig<Loops<__half>::Large>;
using Small = RouteTicketConfig<Loops<__half>::Small>;

MIXPERT_KERNEL(route_grouped_linear_fp16_large, Large, Args, route_grouped_linear)
MIXPERT_KERNEL(route_grouped_linear_fp16_small, Small, Args, route_grouped_linear)

}  // namespace mixpert
