#include "activation_backward.cuh"

namespace mixpert {

using Args = ActivationBackwardArgs<__nv_bfloat16>;
using Config = ActivationBackwardConfig<__nv_bfloat16>;

MIXPERT_KERNEL(activation_backward_bf16, Config, Args, activation_backward_block)

}  // namespace mixpert
