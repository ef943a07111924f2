#include "mainloop_sm90a.cuh"
#include "norm_grouped_linear.cuh"

namespace mixpert {

using Args = NormGroupedLinearArgs<__half>;
using Wgmma = TicketConfig<WarpgroupLoop<__half>>;

MIXPERT_KERNEL(norm_grouped_linear_fp16_wgmma, Wgmma, Args, norm_grouped_linear)

}  // namespace mixpert
