"""Fused attention for Vision Transformers whose sequence is ``[CLS | registers | patches]``."""

from __future__ import annotations

from . import functional
from ._version import __version__
from .dispatch import Explanation
from .errors import UnsupportedError
from .integrations import load_vit
from .layout import TokenLayout
from .monitor import NormReport, TokenNormMonitor
from .nn import RegisterAttention, RegisterBlock, RegisterTokens, RegisterViT, ViTConfig
from .ops.attention.api import explain
from .ops.attention.types import AttentionOutputs, Rope
from .ops.token_norms.types import NormDistribution, TokenNormStats

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
    "__version__",
    "explain",
    "functional",
    "load_vit",
]
