"""Takes over what other libraries' attention modules compute, gives it back, says what it did, and captures statistics.

Not here: how each class is computed, which is in ``attention`` and ``blocks``.
"""

from .api import patch, patched, unpatch
from .capture import Captured, capture
from .report import PatchReport

__all__ = ["Captured", "PatchReport", "capture", "patch", "patched", "unpatch"]
