"""GPU kernels for mixtures of vision experts."""

from . import ops
from ._build_info import __version__
from .hf import FusedMixpertTower, MixpertVisionConfig
from .routing import Routing

__all__ = ["FusedMixpertTower", "MixpertVisionConfig", "Routing", "__version__", "ops"]
