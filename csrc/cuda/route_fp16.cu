#include "route.cuh"

namespace mixpert {

MIXPERT_KERNEL(route_fp16, RouteConfig, RouteArgs<__half>, route_block)

}  // namespace mixpert
