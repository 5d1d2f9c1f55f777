"""DINOv3's ``SelfAttention``, and other packages' copies of it (lightly-train).

Its ``forward`` and ``forward_list`` stay: both call ``compute_attention``, the latter once for each size of crop. One
packed call for all sizes, with the rotation of every image written out, spares a CPU a copy of the gradients and is
somewhat faster there. But most backends must read on the host where the images begin, which waits for a GPU and which
a compiled graph cannot do, and DINOv3 compiles its blocks whole.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...ops.attention.types import unpack_qkv
from ..kind import Kind
from .attend import Attend, rope_on_patches
from .dinov2 import PARTS, difference, heads


def compute_attention(
    module: nn.Module,
    attend: Attend,
    qkv: Tensor,
    attn_bias: object = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``SelfAttention.compute_attention``, which knows no ``attn_bias`` and refuses it.

    The class rotates in the rotation's dtype, by default bf16, to which it rounds query and key of every token, those
    of the prefix too. Here the same cosines and sines turn the patches in fp32, so a model of another dtype gives
    numbers that differ from its own by bf16's rounding, and lie closer to those of exact arithmetic.

    Args:
        module: the module.
        attend: its way into the op.
        qkv: ``[B, N, 3 C]``.
        attn_bias: None.
        rope: sines and cosines of the patches, ``[M, D]``; or with dimensions of images and heads, ``[B or 1, H or 1,
            M, D]``.

    Raises:
        ValueError: if there are not as many rows as patches.
    """
    if attn_bias is not None:
        return type(module).compute_attention(module, qkv, attn_bias, rope)
    qkv = qkv.unflatten(-1, (3, module.num_heads, -1))
    if rope is None:
        return attend.packed(qkv)
    sin, cos = rope
    tokens, rows = qkv.shape[1], sin.shape[-2]
    patches = min(rows, tokens) if attend.num_prefix_tokens is None else tokens - attend.num_prefix_tokens
    options = {"num_prefix_tokens": tokens - patches, "rope": rope_on_patches(cos, sin, patches)}
    if options["rope"] is not None:
        return attend.packed(qkv, **options)
    query, key, value = unpack_qkv(qkv)
    query, key = module.apply_rope(query, key, rope)
    return attend.heads(query, key, value, **options).transpose(1, 2).flatten(2)


def _difference(module: nn.Module) -> str:
    definer = next(cls for cls in type(module).__mro__ if "apply_rope" in vars(cls))
    if definer.__name__ != "SelfAttention" or "apply_rope" in vars(module):
        return f"{definer.__name__} has an apply_rope of its own"
    return difference(module)


KINDS = (
    Kind(
        ("SelfAttention",),
        None,
        compute_attention,
        heads,
        PARTS,
        method="compute_attention",
        refuses=_difference,
        tells=lambda module: hasattr(module, "compute_attention") and hasattr(module, "apply_rope"),
        serves="compute_attention, the rotation of the patches with it, in fp32; also in copies, as lightly-train's",
        leaves="rotated before the op: by head, or learnt; a list of crops is one call a size",
    ),
)
