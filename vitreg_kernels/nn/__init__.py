"""Torch modules built on the fused ops."""

from .attention import RegisterAttention
from .tokens import RegisterTokens

__all__ = ["RegisterAttention", "RegisterTokens"]
