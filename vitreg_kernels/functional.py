"""The ops as functions; each is documented where it lives."""

from __future__ import annotations

from .ops.attention.api import register_attention, register_attention_qkv
from .ops.residual_norm.api import residual_layer_norm

__all__ = ["register_attention", "register_attention_qkv", "residual_layer_norm"]
