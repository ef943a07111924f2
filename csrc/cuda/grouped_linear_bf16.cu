#include "grouped_linear.cuh"

namespace mixpert {

using Args = GroupedLinearArgs<__nv_bfloat16>;
using Large = GroupedLinearConfig<Loops<__nv_bfloat16>::Large>;
using Small = GroupedLinearConfig<Loops<__nv_bfloat16>::Small>;

MIXPERT_KERNEL(grouped_linear_bf16_large, Large, Args, grouped_linear)
MIXPERT_KERNEL(grouped_linear_bf16_small, Small, Args, grouped_linear)

}  // namespace mixpert
