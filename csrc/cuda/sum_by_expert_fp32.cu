#include "sum_by_expert.cuh"

MIXPERT_KERNEL(sum_by_expert_fp32, mixpert::SumByExpertConfig, mixpert::SumByExpertArgs<float>,
               mixpert::sum_by_expert_block)
