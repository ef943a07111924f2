#include "activation_backward.cuh"

MIXPERT_KERNEL(activation_backward_fp32, mixpert::ActivationBackwardConfig<float>, mixpert::ActivationBackwardArgs<float>,
               mixpert::activation_backward_block)
