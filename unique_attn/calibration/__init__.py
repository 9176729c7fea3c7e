"""Which budget, rule and page size a model can take: :func:`calibrate` and ``python -m unique_attn calibrate``."""

from unique_attn.calibration.distances import Distance, distance
from unique_attn.calibration.needles import Needle, make_needle
from unique_attn.calibration.result import Calibration, Row
from unique_attn.calibration.run import calibrate

__all__ = ["Calibration", "Distance", "Needle", "Row", "calibrate", "distance", "make_needle"]
