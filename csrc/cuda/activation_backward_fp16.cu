#include "activation_backward.cuh"

namespace mixpert {

using Args = ActivationBackwardArgs<__half>;
using Config = ActivationBackwardConfig<__half>;

MIXPERT_KERNEL(activation_backward_fp16, Config, Args, activation_backward_block)

}  // namespace mixpert
