"""torchvision's ``EncoderBlock``."""

from __future__ import annotations

from torch import Tensor, nn

from ..kind import Kind
from .add_norm import LEAVES, SERVES, AddNorm, against


def encoder_block(module: nn.Module, add_norm: AddNorm, input: Tensor) -> Tensor:
    """``EncoderBlock.forward``."""
    if against(module):  # by what has come since it was patched
        return type(module).forward(module, input)
    normalized = module.ln_1(input)
    branch, _ = module.self_attention(normalized, normalized, normalized, need_weights=False)
    x, normalized = add_norm(input, module.dropout(branch), None, None, module.ln_2)
    return x + module.mlp(normalized)


KIND = Kind(
    ("EncoderBlock",),
    "torchvision",
    encoder_block,
    None,
    ("ln_1", "self_attention", "dropout", "ln_2", "mlp"),
    refuses=against,
    serves=SERVES,
    leaves=LEAVES,
)
