"""``RegisterAttention``, which needs no patch: only what goes into the op and its statistics are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...nn.attention import RegisterAttention
from ...ops.attention.types import AttentionOutputs
from .attend import Attend


def attention(
    module: RegisterAttention, attend: Attend, op: Callable[..., Any], *tensors: Tensor, **options: Any
) -> Tensor | tuple[Tensor, AttentionOutputs]:
    """``RegisterAttention._attend``, of whose calls something is taken."""
    return attend.call(op, *tensors, **options)
