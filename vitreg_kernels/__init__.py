"""Fused attention for Vision Transformers whose sequence is ``[CLS | registers | patches]``."""

from __future__ import annotations

from . import functional
from ._runtime.dispatch import Explanation, UnsupportedError
from .layout import TokenLayout
from .monitor import NormReport, TokenNormMonitor
from .nn import RegisterAttention, RegisterBlock, RegisterTokens, RegisterViT, ViTConfig
from .ops.attention.api import explain
from .ops.attention.types import AttentionOutputs, Rope
from .ops.token_norms.types import NormDistribution, TokenNormStats

__version__ = "0.1.0"

__all__ = [
    "AttentionOutputs",
    "Explanation",
    "NormDistribution",
    "NormReport",
    "RegisterAttention",
    "RegisterBlock",
    "RegisterTokens",
    "RegisterViT",
    "Rope",
    "TokenLayout",
    "TokenNormMonitor",
    "TokenNormStats",
    "UnsupportedError",
    "ViTConfig",
    "explain",
    "functional",
]
