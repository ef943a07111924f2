#include "activation_backward.cuh"

namespace mixpert {

using Args = ActivationBackwardArgs<float>;
using Config = ActivationBackwardConfig<float>;

MIXPERT_KERNEL(activation_backward_fp32, Config, Args, activation_backward_block)

}  // namespace mixpert
