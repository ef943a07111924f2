"""The ops: contracts, schemas, fakes and gradients. Arithmetic lives in ``mixpert_kernels.backends``."""

from .adaptive_pool import adaptive_pool
from .deform_attn import deform_attn
from .grouped_adapter import grouped_adapter
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear
from .grouped_mlp import grouped_mlp
from .mix_streams import mix_streams
from .norm_grouped_linear import norm_grouped_linear
from .route import RouterWeights, Strategy, route
from .route_grouped_linear import RoutedLinear, route_grouped_linear

__all__ = [
    "RoutedLinear",
    "RouterWeights",
    "Strategy",
    "adaptive_pool",
    "deform_attn",
    "grouped_adapter",
    "grouped_layer_norm",
    "grouped_linear",
    "grouped_mlp",
    "mix_streams",
    "norm_grouped_linear",
    "route",
    "route_grouped_linear",
]
