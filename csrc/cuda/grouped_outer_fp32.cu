#include "grouped_outer.cuh"

namespace mixpert {

using Args = GroupedOuterArgs<float>;
using BlockLoops = Loops<float, Major::kMN, Major::kMN>;
using Large = GroupedOuterConfig<BlockLoops::Large>;
using Small = GroupedOuterConfig<BlockLoops::Small>;

MIXPERT_KERNEL(grouped_outer_fp32_large, Large, Args, grouped_outer_block)
MIXPERT_KERNEL(grouped_outer_fp32_small, Small, Args, grouped_outer_block)

}  // namespace mixpert
