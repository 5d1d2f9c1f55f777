"""open_clip's own ``Attention``: up to release 3.3.0 in its custom blocks alone, since then in all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...nn.hooks import does_nothing, only_drops
from ...ops.attention.types import unpack_qkv
from ..kind import Kind, heads_of
from .attend import Attend


def attention(
    module: nn.Module,
    attend: Attend,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """``Attention.forward`` since release 3.3.0, whose blocks give one tensor as ``x``, ``k_x`` and ``v_x``."""
    crossed = any(other is not None and other is not x for other in (k_x, v_x))
    if crossed or not only_drops(module.attn_drop):
        return type(module).forward(module, x, k_x, v_x, attn_mask)
    return _self_attention(module, attend, x, attn_mask)


def earlier_attention(module: nn.Module, attend: Attend, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """``Attention.forward`` up to release 3.3.0; True in a boolean mask leaves a key out there."""
    if not module.use_fsdpa or not only_drops(module.attn_drop):
        return type(module).forward(module, x, attn_mask)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    return _self_attention(module, attend, x, attn_mask)


def _self_attention(module: nn.Module, attend: Attend, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Under a mask ``[N, N]``, ``[B * H, N, N]`` or ``[B, H, N, N]``, True where a key takes part."""
    qkv = functional.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1))
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(qkv.dtype)
    options = {"attn_mask": attn_mask, "dropout_p": module.attn_drop.p if module.training else 0.0}
    if module.head_scale is None and does_nothing(module.ln_q) and does_nothing(module.ln_k):
        attended = attend.packed(qkv, **options)
    else:
        query, key, value = unpack_qkv(qkv)
        attended = attend.heads(module.ln_q(query), module.ln_k(key), value, **options)
        if module.head_scale is not None:
            attended = attended * module.head_scale
        attended = attended.transpose(1, 2).flatten(2)
    return module.out_drop(module.out_proj(module.ln_inner(attended)))


def _refuses(module: nn.Module) -> str:
    if module.logit_scale is not None:
        return "attends by cosines"
    if module.in_proj_weight is None:
        return "keys and values have widths of their own"
    return ""


# fmt: off
_PARTS = (
    "num_heads", "head_dim", "in_proj_weight", "in_proj_bias", "ln_q", "ln_k", "logit_scale", "attn_drop", "head_scale",
    "ln_inner", "out_proj", "out_drop",
)
# fmt: on

KINDS = (
    Kind(
        ("Attention",),
        "open_clip",
        earlier_attention,
        heads_of,
        _PARTS,
        refuses=_refuses,
        tells=lambda module: hasattr(module, "use_fsdpa"),
        in_blocks=True,
        serves="masks, dropout, norms and scales beside it; of release 3.3.0 in custom blocks",
        leaves="attention by cosines; calls with a hook on attn_drop, or another module in its place; text towers",
    ),
    Kind(
        ("Attention",),
        "open_clip",
        attention,
        heads_of,
        _PARTS,
        refuses=_refuses,
        in_blocks=True,
        serves="the same, of what came after release 3.3.0",
        leaves="the same, and cross-attention",
    ),
)
