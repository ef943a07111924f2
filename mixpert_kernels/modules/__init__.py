"""Experts of any block: grouped leaves, expertize, the fused plan, the router."""

from .expertize import ExpertBlock, expertize
from .grouped import GroupedLayerNorm, GroupedLinear, GroupedParameter, GroupedRMSNorm
from .mole import Instruction, MixtureOfLanguageExperts
from .prenorm import PreNormPlan
from .router import Router

__all__ = [
    "ExpertBlock",
    "GroupedLayerNorm",
    "GroupedLinear",
    "GroupedParameter",
    "GroupedRMSNorm",
    "Instruction",
    "MixtureOfLanguageExperts",
    "PreNormPlan",
    "Router",
    "expertize",
]
