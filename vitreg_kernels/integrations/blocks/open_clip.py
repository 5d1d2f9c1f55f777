"""open_clip's ``ResidualAttentionBlock``."""

from __future__ import annotations

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against, scaled


def residual_attention_block(
    module: nn.Module,
    add_norm: AddNorm,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """``ResidualAttentionBlock.forward``."""
    if k_x is not None or v_x is not None or against(module):  # by what has come since it was patched
        return type(module).forward(module, q_x, k_x, v_x, attn_mask)
    branch = module.attention(q_x=module.ln_1(q_x), attn_mask=attn_mask)
    x, normalized = add_norm(q_x, *scaled(module.ls_1, branch, module), None, module.ln_2)
    return x + module.ls_2(module.mlp(normalized))


KIND = Kind(
    ("ResidualAttentionBlock",),
    "open_clip",
    residual_attention_block,
    None,
    ("ln_1", "attention", "ls_1", "ln_2", "mlp", "ls_2"),
    refuses=against,
    in_blocks=True,
    serves=SERVES,
    leaves=f"{LEAVES}; text towers",
)
