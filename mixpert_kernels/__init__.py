"""GPU kernels for mixtures of vision experts."""

from . import ops
from ._build_info import __version__
from .grids import Grids
from .hf import FusedMixpertTower, MixpertVisionConfig
from .routing import Routing

__all__ = ["FusedMixpertTower", "Grids", "MixpertVisionConfig", "Routing", "__version__", "ops"]
