#include "route.cuh"

namespace mixpert {

MIXPERT_KERNEL(route_bf16, RouteConfig, RouteArgs<__nv_bfloat16>, route_block)

}  // namespace mixpert
