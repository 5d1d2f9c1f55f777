"""Which backend is right and fastest on the machine at hand, found by trying and kept in the user's cache.

Not here: the file (``dispatch.calibration``), or what reads it (``dispatch.preferences``).
"""

from .contest import Outcome
from .run import Calibration, calibrate

__all__ = ["Calibration", "Outcome", "calibrate"]
