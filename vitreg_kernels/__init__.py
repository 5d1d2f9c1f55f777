"""Fused attention for Vision Transformers whose sequence is ``[CLS | registers | patches]``.

The names that users import. Not here: any code of theirs; ``analysis``, which needs packages of its own, is imported by
its own name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import functional
from ._version import __version__
from .dispatch import Explanation
from .errors import UnsupportedError
from .layout import TokenLayout
from .nn import RegisterAttention, RegisterBlock, RegisterTokens, RegisterViT, ViTConfig
from .ops.attention.api import explain
from .ops.attention.types import AttentionOutputs, Rope
from .ops.token_norms.types import NormDistribution, TokenNormStats

if TYPE_CHECKING:
    from .integrations import Captured, PatchReport, capture, load_vit, patch, patched, unpatch
    from .measure.calibrate import Calibration, calibrate
    from .monitor import NormReport, TokenNormMonitor

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


# Imported when first asked for, by name of their subpackage: the modules and functions do not need them.
_LATER = {
    "integrations": ("Captured", "PatchReport", "capture", "load_vit", "patch", "patched", "unpatch"),
    "measure.calibrate": ("Calibration", "calibrate"),
    "monitor": ("NormReport", "TokenNormMonitor"),
}


def __getattr__(name: str) -> Any:
    if name in ("integrations", "monitor"):
        return import_module(f".{name}", __name__)
    for room, names in _LATER.items():
        if name in names:
            return getattr(import_module(f".{room}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
