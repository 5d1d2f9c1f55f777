"""The ops as functions; each is documented where it lives."""

from __future__ import annotations

import torch

from .ops.assemble.api import assemble_tokens
from .ops.attention.api import register_attention, register_attention_qkv
from .ops.residual_norm.api import residual_layer_norm
from .ops.token_norms.api import token_norm_stats, token_norms

__all__ = [
    "SAVE_LIST",
    "assemble_tokens",
    "register_attention",
    "register_attention_qkv",
    "residual_layer_norm",
    "token_norm_stats",
    "token_norms",
]

SAVE_LIST: tuple[torch._ops.OpOverload, ...] = (
    torch.ops.vitreg.attention_forward.default,
    torch.ops.vitreg.attention_forward_qkv.default,
)
"""What selective activation checkpointing should keep of this library, as it keeps torch's own attention: the one
forward that costs more to run again than its output takes. ``create_selective_checkpoint_contexts([*yours,
*SAVE_LIST])``; in DINOv3's training the same, beside its own list."""
