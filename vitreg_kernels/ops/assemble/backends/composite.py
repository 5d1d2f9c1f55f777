"""torch's own add and cat: each token that has a row is added to it once, and all are put side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ....dispatch import Backend
from ..._shared import requirements
from ..._shared.arguments import without_autocast
from .. import features
from ..types import AssembleInputs, sizes_of


def forward(inputs: AssembleInputs) -> Tensor:
    with without_autocast(inputs.patches):  # whose cat does not know every mixture of dtypes
        # The parameters in the dtype of the result; promotion brings the patches there without a copy of their own.
        _, *parameters, dtype = inputs
        cls_token, register_tokens, pos_embed = (None if t is None else t.to(dtype) for t in parameters)
        prefix, patches = [t for t in (cls_token, register_tokens) if t is not None], inputs.patches
        if pos_embed is not None:
            rows = sizes_of(*inputs).prefix_rows
            prefix, patches = _with_rows(prefix, pos_embed[:, :rows]), patches + pos_embed[:, rows:]
        return torch.cat([*(t.expand(patches.shape[0], -1, -1) for t in prefix), patches], dim=1)


def _with_rows(prefix: list[Tensor], rows: Tensor) -> list[Tensor]:
    """Prefix tokens with their rows; CLS tokens, or registers, have either all of theirs or none."""
    found, first = [], 0
    for tokens in prefix:
        last = first + tokens.shape[1]
        found.append(tokens + rows[:, first:last] if last <= rows.shape[1] else tokens)
        first = last
    return found


BACKEND = Backend(
    name="composite",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
)
