"""DINOv2's ``MemEffAttention`` and ``Attention``, and other packages' copies of them (Franca, lightly-train).

Copies are told by names and parts. One that has more parts than DINOv2's computes more, and is left alone.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor, nn

from ...nn.hooks import only_drops
from ..kind import Heads, Kind
from .attend import Attend


def memory_efficient_attention(module: nn.Module, attend: Attend, x: Tensor, attn_bias: object = None) -> Tensor:
    """``MemEffAttention.forward``.

    xformers drops no attention weights, and without it the class drops them. So a call that may drop some is left to
    the class, and so is a mask that does more than keep images apart.

    Args:
        module: the module.
        attend: its way into the op.
        x: ``[B, N, C]``, or crops one after another as ``[1, sum of N, C]``.
        attn_bias: xformers' ``BlockDiagonalMask``, which tells the crops apart.
    """
    if _watched(module) or _dropout(module) or not (attn_bias is None or _keeps_images_apart(attn_bias)):
        return type(module).forward(module, x, attn_bias)
    if attn_bias is None:
        return _attention(module, attend, x)
    crops = attn_bias.q_seqinfo
    return _attention(module, attend, x, cu_seqlens=crops.seqstart.to(x.device), max_seqlen=crops.max_seqlen)


def attention(module: nn.Module, attend: Attend, x: Tensor, is_causal: bool = False) -> Tensor:
    """``Attention.forward`` of ``[B, N, C]``."""
    if is_causal:
        return type(module).forward(module, x, is_causal)
    if _watched(module):
        return type(module).forward(module, x)  # older code takes nothing else
    return _attention(module, attend, x, dropout_p=_dropout(module))


def _attention(module: nn.Module, attend: Attend, x: Tensor, **options: Any) -> Tensor:
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))
    return module.proj_drop(module.proj(attend.packed(qkv, **options)))


def _keeps_images_apart(attn_bias: object) -> bool:
    """Whether a mask lets every token attend to those of its own image; xformers' other masks derive from this one."""
    return (
        type(attn_bias).__name__ == "BlockDiagonalMask"
        and attn_bias.q_seqinfo.seqstart_py == attn_bias.k_seqinfo.seqstart_py
    )


def _dropout(module: nn.Module) -> float:
    """The share of attention weights that a call drops; ``attn_drop`` is a number, a module in older code."""
    drop = module.attn_drop
    rate = drop.p if isinstance(drop, nn.Module) else drop
    return rate if module.training else 0.0


def _watched(module: nn.Module) -> bool:
    """Whether another than the class's dropout is to see the probabilities."""
    drop = module.attn_drop
    return isinstance(drop, nn.Module) and not only_drops(drop)


def heads(module: nn.Module) -> Heads:
    """What DINOv2's and DINOv3's modules ask of the op."""
    return Heads(module.num_heads, module.proj.in_features // module.num_heads)


def difference(module: nn.Module) -> str:
    """In what a module is another than DINOv2's and DINOv3's, which have the same parts; empty if in nothing."""
    own = (*module.named_children(), *module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    if more := [name for name, _ in own if name not in PARTS]:
        return f"has {', '.join(more)}, as the class known here has not"
    if not math.isclose(module.scale, heads(module).head_dim ** -0.5):
        return f"its scale is {module.scale:.3g}, not 1 / sqrt(head dim)"
    return ""


def _beside_the_other(module: nn.Module) -> bool:
    """Whether its class stands in one file with a ``MemEffAttention``; many files have an ``Attention``."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__ if cls.__name__ == "Attention")
    return any(hasattr(file, "MemEffAttention") for file in files)


PARTS = ("num_heads", "scale", "qkv", "attn_drop", "proj", "proj_drop")

KINDS = (
    Kind(
        ("MemEffAttention",),
        None,
        memory_efficient_attention,
        heads,
        PARTS,
        refuses=difference,
        serves="one tensor; lists of crops as one packed call; also in copies, as lightly-train's and Franca's",
        leaves="other masks of xformers; dropout of attention weights, which xformers does not do",
    ),
    Kind(
        ("Attention",),
        None,
        attention,
        heads,
        PARTS,
        refuses=difference,
        tells=_beside_the_other,
        serves="dropout; also in copies",
        leaves="causal calls; calls with a hook on attn_drop, or another module in its place",
    ),
)
