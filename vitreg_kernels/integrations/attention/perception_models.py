"""The ``SelfAttention`` of perception_models' vision encoders, and its rotation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ...ops.attention.types import Rope, unpack_qkv
from ..kind import Kind, heads_of
from .attend import Attend, rope_on_patches


def self_attention(module: nn.Module, attend: Attend, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """``SelfAttention.forward``, which takes a mask and does nothing with it."""
    qkv = functional.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1))
    prefix, rope = _rope(module, x.shape[1])
    if rope is not None:
        attended = attend.packed(qkv, scale=module.scale, rope=rope, num_prefix_tokens=prefix)
    elif module.rope:
        query, key, value = unpack_qkv(qkv)
        attended = attend.heads(*module.rope(query, key), value, scale=module.scale).transpose(1, 2).flatten(2)
    else:
        attended = attend.packed(qkv, scale=module.scale)
    # As in the class, which never calls out_proj: no hook of it runs, and what took its place is asked for its weight.
    return functional.linear(attended, module.out_proj.weight, module.out_proj.bias)


def _rope(module: nn.Module, tokens: int) -> tuple[int, Rope | None]:
    """The tokens before the first patch and the rotation of the patches, if it is the library's own of whole heads.

    It is no module, and all blocks share it: the model sets its angles, one row a token, before they run. Those of the
    CLS token are zero.
    """
    rotation = module.rope
    if type(rotation).__name__ != "Rope2D" or rotation.freq.shape[-1] != module.head_dim:
        return 0, None
    prefix = int(rotation.use_cls_token)
    angles = rotation.freq[:, prefix:]
    return prefix, rope_on_patches(angles.cos(), angles.sin(), tokens - prefix, interleaved=True)


KIND = Kind(
    ("SelfAttention",),
    "core",  # what perception_models imports as
    self_attention,
    heads_of,
    ("num_heads", "head_dim", "in_proj_weight", "in_proj_bias", "out_proj", "rope", "scale"),
    serves="the rotation of the patches with it",
    leaves="a mask, which the class ignores too",
)
