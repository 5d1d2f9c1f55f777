"""timm's ``Attention``, ``AttentionRope`` and ``EvaAttention``: one computation, of which each has a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...nn.hooks import does_nothing, only_drops
from ...ops.attention.types import unpack_qkv
from ..kind import Kind, heads_of
from .attend import Attend, rope_on_patches


def attention(
    module: nn.Module, attend: Attend, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """``Attention.forward``."""
    return _attention(module, attend, x, None, attn_mask, is_causal)


def attention_with_rope(
    module: nn.Module,
    attend: Attend,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``AttentionRope.forward`` and ``EvaAttention.forward``; ``rope`` is sines beside cosines, ``[..., M, 2 D]``."""
    return _attention(module, attend, x, rope, attn_mask, is_causal)


def _attention(
    module: nn.Module, attend: Attend, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    by_formula = not module.fused_attn  # then the class multiplies by its scale, and calls attn_drop
    if is_causal or (by_formula and not only_drops(module.attn_drop)):
        given = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal or None}  # older releases know fewer
        return type(module).forward(module, x, **{name: value for name, value in given.items() if value is not None})
    gate = getattr(module, "gate", None)  # older releases have none
    gate = None if gate is None else gate(x).sigmoid()
    attn_mask = getattr(attn_mask, "_valid_keys", attn_mask)  # which naflex_embeds has put there
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": module.attn_drop.p if module.training else 0.0}
    if by_formula:
        options["scale"] = float(module.scale)
    prefix = 0
    if rope is not None:
        prefix = module.num_prefix_tokens
        sin, cos = rope.chunk(2, -1)
        half = getattr(module, "rotate_half", False)
        options["rope"] = rope_on_patches(cos, sin, x.shape[1] - prefix, interleaved=not half)
        options["num_prefix_tokens"] = prefix
    outside = rope is not None and options["rope"] is None
    qkv = _packed_projection(module, x)
    if qkv is not None and not outside and does_nothing(module.q_norm) and does_nothing(module.k_norm):
        attended = attend.packed(qkv, **options)
    else:
        query, key, value = _separate_projections(module, x) if qkv is None else unpack_qkv(qkv)
        query, key = module.q_norm(query), module.k_norm(key)
        if outside:
            query, key = (_rotated(part, rope, prefix, half).type_as(value) for part in (query, key))
        elif rope is not None:  # as the module does, which without a rotation leaves the norm's dtype
            query, key = query.type_as(value), key.type_as(value)
        attended = attend.heads(query, key, value, **options).transpose(1, 2).flatten(2)
    attended = module.norm(attended)
    if gate is not None:
        attended = attended * gate
    return module.proj_drop(module.proj(attended))


def _packed_projection(module: nn.Module, x: Tensor) -> Tensor | None:
    """``[B, N, 3, H, D]``, or None where the projections are three modules."""
    if module.qkv is None:
        return None
    query_bias = getattr(module, "q_bias", None)
    if query_bias is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat((query_bias, module.k_bias, module.v_bias))
        # The class reads the weight unless told otherwise. What took the layer's place may have none to read.
        if module.qkv_bias_separate or type(module.qkv) is not nn.Linear:
            qkv = module.qkv(x) + bias
        else:
            qkv = functional.linear(x, module.qkv.weight, bias)
    return qkv.unflatten(-1, (3, module.num_heads, -1))


def _separate_projections(module: nn.Module, x: Tensor) -> list[Tensor]:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    key_heads = getattr(module, "num_kv_heads", module.num_heads)
    heads = (module.num_heads, key_heads, key_heads)
    return [p(x).unflatten(-1, (h, -1)).transpose(1, 2) for p, h in zip(projections, heads, strict=True)]


def _rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    return torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)), dim=2)


def naflex_embeds(
    module: nn.Module,
    attend: None,
    x: Tensor,
    patch_coord: Tensor | None,
    patch_valid: Tensor | None,
    attn_mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """``NaFlexVit._forward_embeds``, whose mask tells the attention patched here that it is one of padding.

    That takes the key-padding mask ``[B, 1, 1, N]`` which the additive one carries; everything else takes this as ever.
    A padded token, which nobody attends to, then attends to the valid ones instead of to all alike; timm's poolings
    leave it out. A pack of the valid tokens alone is not made: to count them on the host waits for a GPU and breaks a
    compiled graph, and a block gains little, whose linear layers compute the padding in any case.
    """
    embedded = type(module)._forward_embeds(module, x, patch_coord, patch_valid, attn_mask)
    if attn_mask is None and embedded["attn_mask"] is not None:
        valid = functional.pad(embedded["patch_valid"].bool(), (module.num_prefix_tokens, 0), value=True)
        embedded["attn_mask"]._valid_keys = valid[:, None, None]
    return embedded


# fmt: off
_PARTS = (
    "num_heads", "head_dim", "scale", "fused_attn", "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop",
)
# fmt: on

KINDS = (
    Kind(
        ("Attention",),
        "timm",
        attention,
        heads_of,
        _PARTS,
        serves="masks, dropout, norms and gate beside it; padding of NaFlexVit as a key mask",
        leaves="causal calls; with fused_attn off, calls with a hook on attn_drop, or another module in its place",
    ),
    Kind(
        ("AttentionRope", "EvaAttention"),
        "timm",
        attention_with_rope,
        heads_of,
        (*_PARTS, "num_prefix_tokens"),
        serves="the same, and the rotation of the patches, by image too",
        leaves="the same; rotated before the op: by head, or learnt; repeated before it: grouped keys and values",
    ),
    Kind(("NaFlexVit",), "timm", naflex_embeds, None, ("num_prefix_tokens",), method="_forward_embeds"),
)
