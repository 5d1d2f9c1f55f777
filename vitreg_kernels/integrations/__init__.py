"""Other libraries' Vision Transformers: their checkpoints as a RegisterViT, and where their residual stream passes.

Not here: modules of our own (``nn``), or statistics of what passes (``monitor``).
"""

from .library import ResidualStream
from .load import load_vit
from .residual_stream import residual_stream

__all__ = ["ResidualStream", "load_vit", "residual_stream"]
