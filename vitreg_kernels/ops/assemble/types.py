"""What goes into a call and what comes out of it. Everything here is plain data.

Symbols used throughout the op: B batch, K CLS tokens, R registers, P = K + R prefix tokens, M patches, N = P + M
tokens, C channels of a token. A row is that of the position embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


# Functions, not properties, which torch 2.10 cannot trace of a NamedTuple.
def num_prefix(sizes: Sizes) -> int:
    """P."""
    return sizes.cls_tokens + sizes.registers


def num_tokens(sizes: Sizes) -> int:
    """N."""
    return num_prefix(sizes) + sizes.patches


def sizes_of(
    patches: Tensor, cls_token: Tensor | None, register_tokens: Tensor | None, pos_embed: Tensor | None, *_: Any
) -> Sizes:
    """How many tokens the call with these inputs has of each kind."""
    count = patches.shape[1]
    cls_tokens, registers = (0 if t is None else t.shape[1] for t in (cls_token, register_tokens))
    return Sizes(cls_tokens, registers, count, None if pos_embed is None else pos_embed.shape[1] - count)


class AssembleGradients(NamedTuple):
    """Gradients of the parameters, contiguous, in the parameter's dtype and shape; ``None`` for what nobody wants."""

    cls_token: Tensor | None
    register_tokens: Tensor | None
    pos_embed: Tensor | None
