#include "grouped_layer_norm.cuh"

namespace mixpert {

MIXPERT_KERNEL(grouped_layer_norm_bf16, LayerNormRows, GroupedLayerNormArgs<__nv_bfloat16>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_bf16_wide, LayerNormWideRows, GroupedLayerNormArgs<__nv_bfloat16>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_bf16_any, LayerNormAnyRows, GroupedLayerNormArgs<__nv_bfloat16>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_bf16, LayerNormBackwardRows, GroupedLayerNormBackwardArgs<__nv_bfloat16>,
               grouped_layer_norm_backward_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_bf16_any, LayerNormBackwardAnyRows, GroupedLayerNormBackwardArgs<__nv_bfloat16>,
               grouped_layer_norm_backward_block)

}  // namespace mixpert
