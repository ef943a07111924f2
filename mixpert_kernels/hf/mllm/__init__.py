"""Experts inside transformers' vision-language models."""

from .cost import AddedCost, added_cost
from .features import router_features
from .lora import lora_config
from .mixpertize import mixpertize, unmixpertize
from .monitoring import ExpertSharesCallback, expert_shares
from .routes import forced_routing, record_routing
from .saving import register

__all__ = [
    "AddedCost",
    "ExpertSharesCallback",
    "added_cost",
    "expert_shares",
    "forced_routing",
    "lora_config",
    "mixpertize",
    "record_routing",
    "router_features",
    "unmixpertize",
]

register()
