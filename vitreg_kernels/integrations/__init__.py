"""Other libraries' Vision Transformers: their checkpoints as a RegisterViT, and where their residual stream passes."""

from .checkpoint import load_vit
from .stream import ResidualStream, residual_stream

__all__ = ["ResidualStream", "load_vit", "residual_stream"]
