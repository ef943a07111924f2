#include "grouped_linear_backward.cuh"

namespace mixpert {

using Args = LinearBackwardArgs<float>;
using BlockLoops = Loops<float, Major::kK, Major::kMN>;
using Large = LinearBackwardConfig<BlockLoops::Large>;
using Small = LinearBackwardConfig<BlockLoops::Small>;

MIXPERT_KERNEL(grouped_linear_backward_fp32_large, Large, Args, linear_backward_block)
MIXPERT_KERNEL(grouped_linear_backward_fp32_small, Small, Args, linear_backward_block)

}  // namespace mixpert
