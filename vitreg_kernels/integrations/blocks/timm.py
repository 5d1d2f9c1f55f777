"""timm's ``Block`` and ``EvaBlock``."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against, scaled


def block(
    module: nn.Module, add_norm: AddNorm, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """``Block.forward``."""
    if against(module, module.drop_path1):  # by what has come since it was patched
        return type(module).forward(module, x, attn_mask=attn_mask, is_causal=is_causal)
    branch = module.attn(module.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
    x, normalized = add_norm(x, *scaled(module.ls1, branch, module), module.drop_path1, module.norm2)
    return x + module.drop_path2(module.ls2(module.mlp(normalized)))


def eva_block(
    module: nn.Module,
    add_norm: AddNorm,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``EvaBlock.forward``."""
    if against(module, module.drop_path1):  # by what has come since it was patched
        return type(module).forward(module, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    branch = module.attn(module.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    x, normalized = add_norm(x, branch, module.gamma_1, module.drop_path1, module.norm2)
    branch = module.mlp(normalized)
    if module.gamma_2 is not None:
        branch = module.gamma_2 * branch
    return x + module.drop_path2(branch)


def _refuses(module: nn.Module) -> str:
    if "is_causal" not in inspect.signature(type(module).forward).parameters:  # nor does the attention in it
        return "its forward takes no is_causal in this version"
    return against(module, module.drop_path1)


_PARTS = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

KINDS = (
    Kind(
        ("Block",),
        "timm",
        block,
        None,
        (*_PARTS, "ls1", "ls2"),
        refuses=_refuses,
        tells=lambda module: hasattr(module, "attn"),  # convolutional networks have a Block, too
        serves=SERVES,
        leaves=LEAVES,
    ),
    Kind(
        ("EvaBlock",),
        "timm",
        eva_block,
        None,
        (*_PARTS, "gamma_1", "gamma_2"),
        refuses=_refuses,
        serves=SERVES,
        leaves=LEAVES,
    ),
)
