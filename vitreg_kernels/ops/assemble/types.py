"""What goes into a call and what comes out of it. Everything here is plain data.

Symbols used throughout the op: B batch, K CLS tokens, R registers, P = K + R prefix tokens, M patches, N = P + M
tokens, C channels of a token. A row is that of the position embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """How many tokens there are of each kind, and which of them have a row.

    Attributes:
        cls_tokens: K.
        registers: R.
        patches: M.
        prefix_rows: the first so many tokens of the prefix have a row, and the rows of all patches follow; ``None``
            without a position embedding.
    """

    cls_tokens: int
    registers: int
    patches: int
    prefix_rows: int | None

    @property
    def prefix(self) -> int:
        """P."""
        return self.cls_tokens + self.registers

    @property
    def tokens(self) -> int:
        """N."""
        return self.prefix + self.patches


class AssembleInputs(NamedTuple):
    """A validated call. Every backend takes exactly this.

    Attributes:
        patches: ``[B, M, C]``, any strides.
        cls_token: ``[1, K, C]`` or ``None``.
        register_tokens: ``[1, R, C]`` or ``None``.
        pos_embed: ``[1, M, C]``, ``[1, K + M, C]`` or ``[1, N, C]``, or ``None``.
        dtype: of the result.
    """

    patches: Tensor
    cls_token: Tensor | None
    register_tokens: Tensor | None
    pos_embed: Tensor | None
    dtype: torch.dtype

    @property
    def sizes(self) -> Sizes:
        patches = self.patches.shape[1]
        cls_tokens, registers = (0 if t is None else t.shape[1] for t in (self.cls_token, self.register_tokens))
        prefix_rows = None if self.pos_embed is None else self.pos_embed.shape[1] - patches
        return Sizes(cls_tokens, registers, patches, prefix_rows)


class AssembleGradients(NamedTuple):
    """Gradients of the parameters, contiguous, in the parameter's dtype and shape; ``None`` for what nobody wants."""

    cls_token: Tensor | None
    register_tokens: Tensor | None
    pos_embed: Tensor | None
