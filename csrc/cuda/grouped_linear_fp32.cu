#include "grouped_linear.cuh"

namespace mixpert {

using Args = GroupedLinearArgs<float>;
using Large = GroupedLinearConfig<Loops<float>::Large>;
using Small = GroupedLinearConfig<Loops<float>::Small>;

MIXPERT_KERNEL(grouped_linear_fp32_large, Large, Args, grouped_linear)
MIXPERT_KERNEL(grouped_linear_fp32_small, Small, Args, grouped_linear)

}  // namespace mixpert
