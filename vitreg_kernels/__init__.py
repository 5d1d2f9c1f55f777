"""Fused attention for Vision Transformers whose sequence is ``[CLS | registers | patches]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import functional
from ._version import __version__
from .dispatch import Explanation
from .errors import UnsupportedError
from .integrations import Captured, PatchReport, capture, load_vit, patch, patched, unpatch
from .layout import TokenLayout
from .monitor import NormReport, TokenNormMonitor
from .nn import RegisterAttention, RegisterBlock, RegisterTokens, RegisterViT, ViTConfig
from .ops.attention.api import explain
from .ops.attention.types import AttentionOutputs, Rope
from .ops.token_norms.types import NormDistribution, TokenNormStats

if TYPE_CHECKING:
    from .measure.calibrate import Calibration, calibrate

__all__ = [
    "AttentionOutputs",
    "Calibration",
    "Captured",
    "Explanation",
    "NormDistribution",
    "NormReport",
    "PatchReport",
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
    "calibrate",
    "capture",
    "explain",
    "functional",
    "load_vit",
    "patch",
    "patched",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """What measures is imported when it is first asked for: training needs none of it."""
    if name in ("Calibration", "calibrate"):
        from .measure import calibrate

        return getattr(calibrate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
