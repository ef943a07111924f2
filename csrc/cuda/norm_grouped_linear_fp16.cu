#include "norm_grouped_linear.cuh"

namespace mixpert {

using Args = NormGroupedLinearArgs<__half>;
using Small = TicketConfig<Loops<__half>::Small>;

MIXPERT_KERNEL(norm_grouped_linear_fp16_small, Small, Args, norm_grouped_linear)

}  // namespace mixpert
