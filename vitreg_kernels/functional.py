"""The ops as functions; each is documented where it lives."""

from __future__ import annotations

from .ops.attention.api import register_attention, register_attention_qkv

__all__ = ["register_attention", "register_attention_qkv"]
