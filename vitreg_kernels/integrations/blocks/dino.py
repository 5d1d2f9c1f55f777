"""The blocks of DINOv2 and DINOv3, and other packages' copies of them (Franca, lightly-train).

Stochastic depth there computes a branch for a part of the images alone and adds it to these: such calls are the
class's, and so are DINOv2's lists of crops, whose attention is one packed call in any case.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against, scaled

Rotation = tuple[Tensor, Tensor] | None


def nested_tensor_block(module: nn.Module, add_norm: AddNorm, x_or_x_list: Tensor | list[Tensor]) -> Tensor:
    """``NestedTensorBlock.forward``."""
    if isinstance(x_or_x_list, list) or _drops(module) or against(module):  # by what has come since it was patched
        return type(module).forward(module, x_or_x_list)
    return _block(module, add_norm, x_or_x_list)


def block(module: nn.Module, add_norm: AddNorm, x: Tensor) -> Tensor:
    """DINOv2's ``Block.forward``."""
    return nested_tensor_block(module, add_norm, x)


def self_attention_block(
    module: nn.Module,
    add_norm: AddNorm,
    x_or_x_list: Tensor | list[Tensor],
    rope_or_rope_list: Rotation | list[Rotation] = None,
) -> Tensor | list[Tensor]:
    """``SelfAttentionBlock.forward`` of DINOv3."""
    if _drops(module) or against(module):  # by what has come since it was patched
        return type(module).forward(module, x_or_x_list, rope_or_rope_list)
    if isinstance(x_or_x_list, Tensor):
        return _block(module, add_norm, x_or_x_list, rope=rope_or_rope_list)
    ropes = rope_or_rope_list or [None] * len(x_or_x_list)
    return [_block(module, add_norm, x, rope=rope) for x, rope in zip(x_or_x_list, ropes, strict=True)]


def _block(module: nn.Module, add_norm: AddNorm, x: Tensor, **rotation: Rotation) -> Tensor:
    branch = module.attn(module.norm1(x), **rotation)
    x, normalized = add_norm(x, *scaled(module.ls1, branch, module), None, module.norm2)
    return x + module.ls2(module.mlp(normalized))


def _drops(module: nn.Module) -> bool:
    return module.training and module.sample_drop_ratio > 0.0


def _refuses(module: nn.Module) -> str:
    if more := [name for name, _ in module.named_children() if name not in (*_CHILDREN, "drop_path1", "drop_path2")]:
        return f"has {', '.join(more)}, as the class known here has not"
    return against(module)


def _beside_the_other(module: nn.Module) -> bool:
    """Whether its class stands in one file with a ``NestedTensorBlock``; many files have a ``Block``."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__ if cls.__name__ == "Block")
    return any(hasattr(file, "NestedTensorBlock") for file in files)


_CHILDREN = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
_PARTS = (*_CHILDREN, "sample_drop_ratio")
_LEAVES = f"{LEAVES}; stochastic depth, which takes a part of the images"

DINOV2 = (
    Kind(
        ("NestedTensorBlock",),
        None,
        nested_tensor_block,
        None,
        _PARTS,
        refuses=_refuses,
        serves=SERVES,
        leaves=f"{_LEAVES}; lists of crops",
    ),
    Kind(
        ("Block",),
        None,
        block,
        None,
        _PARTS,
        refuses=_refuses,
        tells=_beside_the_other,
        serves=SERVES,
        leaves=f"{_LEAVES}; lists of crops",
    ),
)
DINOV3 = (
    Kind(
        ("SelfAttentionBlock",),
        None,
        self_attention_block,
        None,
        _PARTS,
        refuses=_refuses,
        serves=SERVES,
        leaves=_LEAVES,
    ),
)
