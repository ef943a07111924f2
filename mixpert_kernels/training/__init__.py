"""Training: its stages, experts side by side, the router and its thresholds."""

from .calibration import Calibration, calibrate
from .loss import per_expert_mean
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
    "STAGES",
    "Calibration",
    "ExpertOptimizer",
    "Recipe",
    "StageRow",
    "calibrate",
    "find_tower",
    "fit_router",
    "grouped_parameters",
    "per_expert_mean",
    "set_stage",
    "shard_placement",
    "stage_of",
    "train",
]
