"""torch's ``nn.MultiheadAttention``, as the blocks of Vision Transformers call it: of one tensor, without weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kind import Kind, heads_of
from .attend import Attend


def self_attention(
    module: nn.MultiheadAttention,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``MultiheadAttention.forward``; ``[B, N, C]``, or ``[N, B, C]``, or ``[N, C]``, as the query is.

    The module's own forward takes what is not self-attention or must give weights, what torch refuses or warns of, and
    causal calls, for which torch has a kernel that skips half of the work.
    """
    dropout = module.dropout if module.training else 0.0
    if (
        need_weights
        or is_causal
        or not (query is key is value)
        or query.is_nested
        or dropout == 1.0
        or not _masks_fit(module, query, key_padding_mask, attn_mask)
    ):
        return type(module).forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    qkv = functional.linear(query, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1))
    batched = query.dim() == 3
    if not batched:
        qkv = qkv[None]
    elif not module.batch_first:
        qkv = qkv.transpose(0, 1)
    attended = attend.packed(qkv, attn_mask=_mask(key_padding_mask, attn_mask, module.num_heads), dropout_p=dropout)
    if not batched:
        attended = attended[0]
    elif not module.batch_first:
        attended = attended.transpose(0, 1)
    # As in the class, which never calls out_proj: no hook of it runs, and what took its place is asked for its weight.
    return functional.linear(attended, module.out_proj.weight, module.out_proj.bias), None


def _masks_fit(
    module: nn.MultiheadAttention, query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether the masks have one dtype, bool or the query's, and shapes that the class takes."""
    sizes = query.shape[:-1]
    *batch, tokens = sizes if module.batch_first else sizes[::-1]  # an image alone has no batch
    by_head = (math.prod(batch) * module.num_heads, tokens, tokens)
    if key_padding_mask is not None and key_padding_mask.shape != (*batch, tokens):
        return False
    if attn_mask is not None and attn_mask.shape not in ((tokens, tokens), by_head):
        return False
    dtypes = {mask.dtype for mask in (key_padding_mask, attn_mask) if mask is not None}
    return dtypes <= {torch.bool} or dtypes <= {query.dtype}


def _mask(key_padding_mask: Tensor | None, attn_mask: Tensor | None, heads: int) -> Tensor | None:
    """Both masks in one that broadcasts to ``[B, H, N, N]``; a boolean one says who takes part, not who is left out."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[..., None, None, :]
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
    elif attn_mask.dtype == torch.bool:
        mask = attn_mask | key_padding_mask
    else:
        mask = attn_mask + key_padding_mask
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _refuses(module: nn.MultiheadAttention) -> str:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "has a forward of its own"  # as that of torch.ao, which has the same name
    if module.in_proj_weight is None:
        return "keys and values have widths of their own"
    if module.bias_k is not None or module.add_zero_attn:
        return "adds keys to those of the tokens"
    return ""


KIND = Kind(
    ("MultiheadAttention",),
    "torch",
    self_attention,
    heads_of,
    ("in_proj_weight", "in_proj_bias", "bias_k", "add_zero_attn", "dropout", "batch_first", "out_proj"),
    refuses=_refuses,
    in_blocks=True,
    serves="all forms of masks, dropout, either order of batch and tokens",
    leaves="need_weights, cross-attention, causal calls, nested tensors; text towers, pools and decoders",
)
