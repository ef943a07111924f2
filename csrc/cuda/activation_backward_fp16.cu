#include "activation_backward.cuh"

MIXPERT_KERNEL(activation_backward_fp16, mixpert::ActivationBackwardConfig<__half>, mixpert::ActivationBackwardArgs<__half>,
               mixpert::activation_backward_block)
