"""route_grouped_linear on a CPU: its three ops, where there is no launch to save; routing is the reference's."""

import functools

from mixpert_kernels.backends.reference.route import route
from mixpert_kernels.backends.reference.route_grouped_linear import three_ops

from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear

route_grouped_linear = functools.partial(three_ops, route, grouped_layer_norm, grouped_linear)
