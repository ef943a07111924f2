#include "sum_by_expert.cuh"

namespace mixpert {

using Args = SumByExpertArgs<__nv_bfloat16>;

MIXPERT_KERNEL(sum_by_expert_bf16, SumByExpertConfig, Args, sum_by_expert_block)

}  // namespace mixpert
