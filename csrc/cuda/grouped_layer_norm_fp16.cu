#include "grouped_layer_norm.cuh"

namespace mixpert {

MIXPERT_KERNEL(grouped_layer_norm_fp16, LayerNormRows, GroupedLayerNormArgs<__half>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_fp16_wide, LayerNormWideRows, GroupedLayerNormArgs<__half>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_fp16_any, LayerNormAnyRows, GroupedLayerNormArgs<__half>, grouped_layer_norm_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_fp16, LayerNormBackwardRows, GroupedLayerNormBackwardArgs<__half>,
               grouped_layer_norm_backward_block)
MIXPERT_KERNEL(grouped_layer_norm_backward_fp16_any, LayerNormBackwardAnyRows, GroupedLayerNormBackwardArgs<__half>,
               grouped_layer_norm_backward_block)

}  // namespace mixpert
