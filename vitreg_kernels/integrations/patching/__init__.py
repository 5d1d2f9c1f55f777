"""Takes over what other libraries' attention modules compute, gives it back, says what it did, and captures statistics.

How each class is computed is in ``attention``.
"""

from .api import patch, patched, unpatch
from .capture import Captured, capture
from .report import PatchReport

__all__ = ["Captured", "PatchReport", "capture", "patch", "patched", "unpatch"]
