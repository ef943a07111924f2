#include "route.cuh"

namespace mixpert {

MIXPERT_KERNEL(route_fp32, RouteConfig, RouteArgs<float>, route_block)

}  // namespace mixpert
