"""grouped_mlp on a CPU: two fused oneDNN linears for each run of tiles that share an expert."""

import functools

from mixpert_kernels.backends.reference.activations import activate
from mixpert_kernels.backends.reference.grouped_mlp import two_layers, two_layers_backward

from . import grouped_linear as linear

grouped_mlp = functools.partial(two_layers, linear)
grouped_mlp_backward = functools.partial(
    two_layers_backward, linear, lambda activation, pre, cu_seqlens: activate(activation, pre)
)
