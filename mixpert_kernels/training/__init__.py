"""Training: its stages, experts side by side, the router and its thresholds."""

from .adapter_optimizer import AdapterOptimizer
from .calibration import Calibration, calibrate
from .loss import per_expert_mean
from .mome_stages import MOME_STAGES, set_mome_stage
from .optimizer import ExpertOptimizer, shard_placement
from .recipe import Recipe
from .router import fit_router
from .run import train
from .stages import (
    STAGES,
    StageRow,
    find_tower,
    grouped_parameters,
    set_stage,
    stage_of,
)

__all__ = [
    "MOME_STAGES",
    "STAGES",
    "AdapterOptimizer",
    "Calibration",
    "ExpertOptimizer",
    "Recipe",
    "StageRow",
    "calibrate",
    "find_tower",
    "fit_router",
    "grouped_parameters",
    "per_expert_mean",
    "set_mome_stage",
    "set_stage",
    "shard_placement",
    "stage_of",
    "train",
]
