"""Experts inside transformers' vision-language models."""

from .features import router_features
from .lora import lora_config
from .mixpertize import mixpertize, unmixpertize
from .routes import forced_routing, record_routing
from .saving import register

__all__ = [
    "forced_routing",
    "lora_config",
    "mixpertize",
    "record_routing",
    "router_features",
    "unmixpertize",
]

register()
