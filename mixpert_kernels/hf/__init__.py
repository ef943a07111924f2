"""Everything that knows transformers."""

from .configuration import MixpertVisionConfig
from .outputs import MixpertOutput
from .tower import FusedMixpertTower

__all__ = ["FusedMixpertTower", "MixpertOutput", "MixpertVisionConfig"]
