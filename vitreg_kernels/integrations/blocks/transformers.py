"""The pre-norm layers of transformers' vision models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against, scaled


def dinov2_layer(module: nn.Module, add_norm: AddNorm, hidden_states: Tensor) -> Tensor:
    """``Dinov2Layer.forward`` and that of its kin with registers."""
    if against(module, module.drop_path):  # by what has come since it was patched
        return type(module).forward(module, hidden_states)
    return _layer(module, add_norm, hidden_states, module.attention(module.norm1(hidden_states)))


def dinov3_layer(
    module: nn.Module,
    add_norm: AddNorm,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """``DINOv3ViTLayer.forward``."""
    given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
    if against(module, module.drop_path):  # by what has come since it was patched
        return type(module).forward(module, hidden_states, **given)
    return _layer(module, add_norm, hidden_states, module.attention(module.norm1(hidden_states), **given)[0])


def vit_layer(
    module: nn.Module,
    add_norm: AddNorm,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ViTLayer.forward``, and that of its kin."""
    if against(module):  # by what has come since it was patched
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    branch, _ = module.attention(module.layernorm_before(hidden_states), attention_mask, **kwargs)
    stream, normalized = add_norm(hidden_states, module.dropout(branch), None, None, module.layernorm_after)
    return module.dropout(module.mlp(normalized)) + stream


def clip_layer(
    module: nn.Module, add_norm: AddNorm, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """``CLIPEncoderLayer.forward``, and that of its kin."""
    if against(module):  # by what has come since it was patched
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    normalized = module.layer_norm1(hidden_states)
    branch, _ = module.self_attn(hidden_states=normalized, attention_mask=attention_mask, **kwargs)
    stream, normalized = add_norm(hidden_states, branch, None, None, module.layer_norm2)
    return stream + module.mlp(normalized)


def _layer(module: nn.Module, add_norm: AddNorm, stream: Tensor, branch: Tensor) -> Tensor:
    """The rest of a layer behind its attention."""
    stream, normalized = add_norm(stream, *scaled(module.layer_scale1, branch, module), module.drop_path, module.norm2)
    return module.drop_path(module.layer_scale2(module.mlp(normalized))) + stream


def _clip_refuses(module: nn.Module) -> str:
    if "Text" in type(getattr(module.self_attn, "config", None)).__name__:
        return "of the text part"
    return against(module)


def _refuses(module: nn.Module) -> str:
    return against(module, module.drop_path)


_PARTS = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")

KINDS = (
    Kind(
        ("Dinov2Layer", "Dinov2WithRegistersLayer"),
        "transformers",
        dinov2_layer,
        None,
        _PARTS,
        refuses=_refuses,
        serves=SERVES,
        leaves=LEAVES,
    ),
    Kind(
        ("DINOv3ViTLayer",),
        "transformers",
        dinov3_layer,
        None,
        _PARTS,
        refuses=_refuses,
        serves=SERVES,
        leaves=LEAVES,
    ),
    Kind(
        ("ViTLayer", "DeiTLayer", "IJepaLayer", "ViTMAELayer", "ViTMSNLayer"),
        "transformers",
        vit_layer,
        None,
        ("layernorm_before", "attention", "dropout", "layernorm_after", "mlp"),
        refuses=against,
        serves=SERVES,
        leaves=LEAVES,
    ),
    Kind(
        ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer", "MetaClip2EncoderLayer"),
        "transformers",
        clip_layer,
        None,
        ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
        refuses=_clip_refuses,
        serves=SERVES,
        leaves=f"{LEAVES}; text",
    ),
)
