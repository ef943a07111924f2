#include "grouped_linear_sm90a.cuh"

namespace mixpert {

MIXPERT_KERNEL(grouped_linear_bf16_wgmma, WgmmaConfig, WgmmaArgs<__nv_bfloat16>, grouped_linear_wgmma)

}  // namespace mixpert
