"""norm_grouped_linear by Triton: the launches of its two ops. One launch instead is backends/cuda's."""

import functools

from mixpert_kernels.backends.reference.norm_grouped_linear import two_ops

from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear

norm_grouped_linear = functools.partial(two_ops, grouped_layer_norm, grouped_linear)
