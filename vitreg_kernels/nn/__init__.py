"""Torch modules built on the fused ops.

Not here: other libraries' models and checkpoints (``integrations``), or any choice between backends (``dispatch``).
"""

from .attention import RegisterAttention
from .block import RegisterBlock
from .config import PRESETS, ViTConfig
from .tokens import RegisterTokens, patch_like_registers
from .vit import RegisterViT

__all__ = [
    "PRESETS",
    "RegisterAttention",
    "RegisterBlock",
    "RegisterTokens",
    "RegisterViT",
    "ViTConfig",
    "patch_like_registers",
]
