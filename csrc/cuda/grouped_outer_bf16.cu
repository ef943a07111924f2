#include "grouped_outer.cuh"

namespace mixpert {

using Args = GroupedOuterArgs<__nv_bfloat16>;
using BlockLoops = Loops<__nv_bfloat16, Major::kMN, Major::kMN>;
using Large = GroupedOuterConfig<BlockLoops::Large>;
using Small = GroupedOuterConfig<BlockLoops::Small>;

MIXPERT_KERNEL(grouped_outer_bf16_large, Large, Args, grouped_outer_block)
MIXPERT_KERNEL(grouped_outer_bf16_small, Small, Args, grouped_outer_block)

}  // namespace mixpert
