#include "grouped_layer_norm.cuh"

namespace mixpert {

MIXPERT_KERNEL(grouped_layer_norm_fp32, LayerNormRows, GroupedLayerNormArgs<float>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_fp32_wide, LayerNormWideRows, GroupedLayerNormArgs<float>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_fp32_any, LayerNormAnyRows, GroupedLayerNormArgs<float>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_fp32, LayerNormBackwardRows, GroupedLayerNormBackwardArgs<float>,
               grouped_layer_norm_backward_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_fp32_any, LayerNormBackwardAnyRows, GroupedLayerNormBackwardArgs<float>,
               grouped_layer_norm_backward_block)

}  // namespace mixpert
