"""Other libraries' Vision Transformers: their checkpoints as a RegisterViT, where their residual stream passes, and
their attention by this library's kernels.

Not here: modules of our own (``nn``), or statistics of what passes (``monitor``).
"""

from .attention.transformers import register_transformers
from .library import ResidualStream
from .load import load_vit
from .patching import Captured, PatchReport, capture, patch, patched, unpatch
from .residual_stream import residual_stream

__all__ = [
    "Captured",
    "PatchReport",
    "ResidualStream",
    "capture",
    "load_vit",
    "patch",
    "patched",
    "register_transformers",
    "residual_stream",
    "unpatch",
]
