#include "norm_grouped_linear.cuh"

namespace mixpert {

using Args = NormGroupedLinearArgs<float>;
using Small = TicketConfig<Loops<float>::Small>;

MIXPERT_KERNEL(norm_grouped_linear_fp32_small, Small, Args, norm_grouped_linear)

}  // namespace mixpert
