"""``RegisterAttention``, which needs no patch: only its statistics are taken."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...nn.attention import RegisterAttention
from ...ops.attention.types import AttentionOutputs, Rope
from .attend import Attend, hand_over, wanted_by


def attention(
    module: RegisterAttention,
    attend: Attend,
    x: Tensor,
    attn_mask: Tensor | None = None,
    rope: Rope | None = None,
    *,
    outputs: Sequence[str] = (),
    is_causal: bool = False,
) -> Tensor | tuple[Tensor, AttentionOutputs]:
    """``RegisterAttention.forward``, asked for what is captured besides ``outputs``."""
    takers = tuple(attend.takers)
    wanted = tuple(dict.fromkeys((*outputs, *wanted_by(takers))))
    result = RegisterAttention.forward(module, x, attn_mask, rope, outputs=wanted, is_causal=is_causal)
    if not wanted:
        return result
    output, statistics = result
    hand_over(statistics, takers)
    asked = {name: getattr(statistics, name) for name in outputs}
    return (output, AttentionOutputs(**asked)) if outputs else output
