"""grouped_mlp on a CPU: two fused oneDNN linears for each run of tiles that share an expert."""

import functools

from mixpert_kernels.backends.reference.grouped_mlp import (
    grouped_mlp_backward as grouped_mlp_backward,
)
from mixpert_kernels.backends.reference.grouped_mlp import two_layers

from . import grouped_linear as linear

grouped_mlp = functools.partial(two_layers, linear)
