"""Experts of any block: grouped leaves, expertize, the fused plan, the router."""

from .adt import AdaptiveDeformableTransform
from .expertize import ExpertBlock, expertize
from .grouped import GroupedLayerNorm, GroupedLinear, GroupedParameter, GroupedRMSNorm
from .mole import Instruction, MixtureOfLanguageExperts
from .move import Features, MixtureOfVisionExperts, VisionBranch
from .prenorm import PreNormPlan
from .router import Router

__all__ = [
    "AdaptiveDeformableTransform",
    "ExpertBlock",
    "Features",
    "GroupedLayerNorm",
    "GroupedLinear",
    "GroupedParameter",
    "GroupedRMSNorm",
    "Instruction",
    "MixtureOfLanguageExperts",
    "MixtureOfVisionExperts",
    "PreNormPlan",
    "Router",
    "VisionBranch",
    "expertize",
]
