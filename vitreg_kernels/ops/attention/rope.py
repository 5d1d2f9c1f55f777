"""Rotary position embedding in plain torch, for backends whose kernels know nothing of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import AttentionInputs, Rope


def rotate_query_and_key(inputs: AttentionInputs) -> AttentionInputs:
    """A call that has a ``rope`` with the rotation carried out: query and key rotated in fp32 and rounded once."""
    rope, prefix = inputs.rope, inputs.num_prefix_tokens
    if inputs.cu_seqlens is None:
        query, key = (
            torch.cat((x[:, :, :prefix], _rotate(x[:, :, prefix:], rope)), 2) for x in (inputs.query, inputs.key)
        )
    else:
        rope = _row_for_every_token(rope, inputs.cu_seqlens, inputs.query.shape[2], prefix)
        query, key = (_rotate(x, rope) for x in (inputs.query, inputs.key))
    return inputs._replace(query=query, key=key, rope=None)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in (rope.cos, rope.sin))
    pairs = x.unflatten(-1, (-1, 2) if rope.interleaved else (2, -1))
    first, second = pairs.unbind(-1 if rope.interleaved else -2)
    partner = torch.stack((-second, first), -1 if rope.interleaved else -2).flatten(-2)
    return (x * cos + partner * sin).to(x.dtype)


def _row_for_every_token(rope: Rope, cu_seqlens: Tensor, tokens: int, prefix: int) -> Rope:
    """Cos and sin rows for all packed tokens: a patch's own, and for a prefix token the rotation by nothing."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    image = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    is_prefix = (position - cu_seqlens[image] < prefix).unsqueeze(-1)
    row = (position - (image + 1) * prefix).clamp_(min=0)
    if rope.cos.shape[-2] == 0:  # every image is all prefix
        shape = (tokens, rope.cos.shape[-1])
        return Rope(rope.cos.new_ones(shape), rope.sin.new_zeros(shape), rope.interleaved)
    cos, sin = (t.reshape(-1, t.shape[-1])[row] for t in (rope.cos, rope.sin))
    return Rope(cos.masked_fill(is_prefix, 1.0), sin.masked_fill(is_prefix, 0.0), rope.interleaved)
