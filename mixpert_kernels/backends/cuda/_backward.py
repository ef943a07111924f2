"""The backward of grouped_linear and grouped_mlp, which their files re-export."""

import functools

from mixpert_kernels.backends.backward import Pieces, linear_backward, mlp_backward

from ._dx import linear_dx
from ._reduce import backward_parts, sums_by_expert
from .grouped_outer import grouped_outer

PIECES = Pieces(backward_parts, sums_by_expert, linear_dx, grouped_outer)
grouped_linear_backward = functools.partial(linear_backward, PIECES)
grouped_mlp_backward = functools.partial(mlp_backward, PIECES)
