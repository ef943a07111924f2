#include "activation_backward.cuh"

MIXPERT_KERNEL(activation_backward_bf16, mixpert::ActivationBackwardConfig<__nv_bfloat16>, mixpert::ActivationBackwardArgs<__nv_bfloat16>,
               mixpert::activation_backward_block)
