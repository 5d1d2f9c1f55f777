"""The ops as functions; each is documented where it lives."""

from __future__ import annotations

from .ops.assemble.api import assemble_tokens
from .ops.attention.api import register_attention, register_attention_qkv
from .ops.residual_norm.api import residual_layer_norm
from .ops.token_norms.api import token_norm_stats, token_norms

__all__ = [
    "assemble_tokens",
    "register_attention",
    "register_attention_qkv",
    "residual_layer_norm",
    "token_norm_stats",
    "token_norms",
]
