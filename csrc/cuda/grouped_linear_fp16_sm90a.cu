#include "grouped_linear_sm90a.cuh"

namespace mixpert {

MIXPERT_KERNEL(grouped_linear_fp16_wgmma, WgmmaConfig, WgmmaArgs<__half>, grouped_linear_wgmma)

}  // namespace mixpert
