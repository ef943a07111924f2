#include "grouped_linear.cuh"

namespace mixpert {

using Args = GroupedLinearArgs<__half>;
using Large = GroupedLinearConfig<Loops<__half>::Large>;
using Small = GroupedLinearConfig<Loops<__half>::Small>;

MIXPERT_KERNEL(grouped_linear_fp16_large, Large, Args, grouped_linear)
MIXPERT_KERNEL(grouped_linear_fp16_small, Small, Args, grouped_linear)

}  // namespace mixpert
