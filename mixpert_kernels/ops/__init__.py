"""The ops: contracts, schemas, fakes and gradients. Arithmetic lives in ``mixpert_kernels.backends``."""

from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear
from .grouped_mlp import grouped_mlp
from .route import RouterWeights, Strategy, route

__all__ = [
    "RouterWeights",
    "Strategy",
    "grouped_layer_norm",
    "grouped_linear",
    "grouped_mlp",
    "route",
]
