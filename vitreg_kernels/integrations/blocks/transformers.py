"""The layers of transformers' DINOv2 and DINOv3 models, with and without registers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against, scaled


def dinov2_layer(module: nn.Module, add_norm: AddNorm, hidden_states: Tensor) -> Tensor:
    """``Dinov2Layer.forward`` and that of its kin with registers."""
    if against(module.norm2, module.drop_path):  # by what has come since it was patched
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
    if against(module.norm2, module.drop_path):  # by what has come since it was patched
        return type(module).forward(module, hidden_states, **given)
    return _layer(module, add_norm, hidden_states, module.attention(module.norm1(hidden_states), **given)[0])


def _layer(module: nn.Module, add_norm: AddNorm, stream: Tensor, branch: Tensor) -> Tensor:
    """The rest of a layer behind its attention."""
    stream, normalized = add_norm(stream, *scaled(module.layer_scale1, branch), module.drop_path, module.norm2)
    return module.drop_path(module.layer_scale2(module.mlp(normalized))) + stream


def _refuses(module: nn.Module) -> str:
    return against(module.norm2, module.drop_path)


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
