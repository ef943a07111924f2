#include "sum_by_expert.cuh"

namespace mixpert {

using Args = SumByExpertArgs<__half>;

MIXPERT_KERNEL(sum_by_expert_fp16, SumByExpertConfig, Args, sum_by_expert_block)

}  // namespace mixpert
