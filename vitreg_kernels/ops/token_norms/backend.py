"""What a backend of this op is: two functions, where other ops' have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...dispatch import Backend
from ...layout import TokenLayout
from .types import NormDistribution


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenNormsBackend(Backend):
    """``forward(x)`` gives the norms ``[B, N]`` of tokens ``[B, N, C]``; nothing carries a gradient.

    Attributes:
        accumulate: counts one fp32 norm or more into the distributions of their groups, in place. Always runs behind
            the op of ``schema.py``, whether or not ``forward`` does.
    """

    accumulate: Callable[[Tensor, TokenLayout, NormDistribution], None]
