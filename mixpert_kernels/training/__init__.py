"""Training the router and calibrating its thresholds."""

from .calibration import Calibration, calibrate
from .router import fit_router

__all__ = ["Calibration", "calibrate", "fit_router"]
