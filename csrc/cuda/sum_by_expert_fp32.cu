#include "sum_by_expert.cuh"

namespace mixpert {

using Args = SumByExpertArgs<float>;

MIXPERT_KERNEL(sum_by_expert_fp32, SumByExpertConfig, Args, sum_by_expert_block)

}  // namespace mixpert
