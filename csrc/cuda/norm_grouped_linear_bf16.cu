#include "norm_grouped_linear.cuh"

namespace mixpert {

using Args = NormGroupedLinearArgs<__nv_bfloat16>;
using Small = TicketConfig<Loops<__nv_bfloat16>::Small>;

MIXPERT_KERNEL(norm_grouped_linear_bf16_small, Small, Args, norm_grouped_linear)

}  // namespace mixpert
