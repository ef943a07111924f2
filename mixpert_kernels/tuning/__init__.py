"""Which backend is the fastest at a model's widths, measured on the device at hand; ``backends.choice`` keeps it."""

from .calls import Call
from .run import Report, Timing, as_json, tune

__all__ = ["Call", "Report", "Timing", "as_json", "tune"]
