#include "sum_by_expert.cuh"

MIXPERT_KERNEL(sum_by_expert_fp16, mixpert::SumByExpertConfig, mixpert::SumByExpertArgs<__half>,
               mixpert::sum_by_expert_block)
