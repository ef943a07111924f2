#include "mainloop_sm90a.cuh"
#include "norm_grouped_linear.cuh"

namespace mixpert {

using Args = NormGroupedLinearArgs<__nv_bfloat16>;
using Wgmma = TicketConfig<WarpgroupLoop<__nv_bfloat16>>;

MIXPERT_KERNEL(norm_grouped_linear_bf16_wgmma, Wgmma, Args, norm_grouped_linear)

}  // namespace mixpert
