"""Experts inside transformers' vision-language models."""

from .features import router_features
from .mixpertize import mixpertize, unmixpertize
from .routes import forced_routing, record_routing
from .saving import register

__all__ = [
    "forced_routing",
    "mixpertize",
    "record_routing",
    "router_features",
    "unmixpertize",
]

register()
