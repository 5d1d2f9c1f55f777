"""Fused attention for Vision Transformers whose sequence is ``[CLS | registers | patches]``."""

from __future__ import annotations

from . import functional
from ._runtime.dispatch import Explanation, UnsupportedError
from .layout import TokenLayout
from .nn import RegisterAttention, RegisterTokens
from .ops.attention.api import explain
from .ops.attention.types import AttentionOutputs, Rope

__version__ = "0.1.0"

__all__ = [
    "AttentionOutputs",
    "Explanation",
    "RegisterAttention",
    "RegisterTokens",
    "Rope",
    "TokenLayout",
    "UnsupportedError",
    "explain",
    "functional",
]
