"""The layers of transformers' DINOv2 and DINOv3 models, with and without registers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.hooks import untouched
from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, can_drop, can_norm


def dinov2_layer(module: nn.Module, add_norm: AddNorm, hidden_states: Tensor) -> Tensor:
    """``Dinov2Layer.forward`` and that of its kin with registers."""
    if not _is_as_it_was(module):
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
    if not _is_as_it_was(module):
        return type(module).forward(module, hidden_states, **given)
    return _layer(module, add_norm, hidden_states, module.attention(module.norm1(hidden_states), **given)[0])


def _layer(module: nn.Module, add_norm: AddNorm, stream: Tensor, branch: Tensor) -> Tensor:
    """The rest of a layer behind its attention."""
    scale = module.layer_scale1
    gamma = scale.lambda1 if _is_plain(scale) else None
    branch = branch if _is_plain(scale) else scale(branch)
    stream, normalized = add_norm(stream, branch, gamma, module.drop_path, module.norm2)
    return module.drop_path(module.layer_scale2(module.mlp(normalized))) + stream


def _is_plain(scale: nn.Module) -> bool:
    return type(scale).__name__.endswith("LayerScale") and untouched(scale)


def _is_as_it_was(module: nn.Module) -> bool:
    """Whether nothing has come, since the layer was patched, that is to see what fusion leaves out."""
    return can_norm(module.norm2) and can_drop(module.drop_path)


def _refuses(module: nn.Module) -> str:
    if not can_norm(module.norm2):
        return f"its norm2 is a {type(module.norm2).__name__} or hooked, and a plain LayerNorm alone is fused"
    if not can_drop(module.drop_path):
        return f"its drop_path is a {type(module.drop_path).__name__} or hooked, and a plain DropPath alone is fused"
    return ""


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
)
