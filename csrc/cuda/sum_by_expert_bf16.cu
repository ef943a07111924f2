#include "sum_by_expert.cuh"

MIXPERT_KERNEL(sum_by_expert_bf16, mixpert::SumByExpertConfig, mixpert::SumByExpertArgs<__nv_bfloat16>,
               mixpert::sum_by_expert_block)
