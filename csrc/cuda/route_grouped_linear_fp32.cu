#include "route_grouped_linear.cuh"

namespace mixpert {

using Args = RouteGroupedLinearArgs<float>;
using Large = RouteTicketConfig<Loops<float>::Large>;
using Small = RouteTicketConfig<Loops<float>::Small>;

MIXPERT_KERNEL(route_grouped_linear_fp32_large, Large, Args, route_grouped_linear)
MIXPERT_KERNEL(route_grouped_linear_fp32_small, Small, Args, route_grouped_linear)

}  // namespace mixpert
