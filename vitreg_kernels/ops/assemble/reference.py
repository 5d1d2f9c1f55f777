"""The specification of the op: what every backend must compute, in plain torch, readable in one sitting.

Differentiable by autograd. Run in fp64 it gives what the accuracy rule takes for exact; run in the inputs' own dtype
it is the eager formula a backend's error is held against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import AssembleInputs, num_prefix, sizes_of


def assemble_tokens(inputs: AssembleInputs) -> Tensor:
    """``[CLS | registers | patches]``, and to each token that has one its row of the position embedding added.

    Position embedding: Dosovitskiy et al., arXiv 2010.11929, eq. 1; registers: Darcet et al., arXiv 2309.16588. The
    addition is made in the dtype of the result.
    """
    patches, cls_token, register_tokens, pos_embed = (None if t is None else t.to(inputs.dtype) for t in inputs[:4])
    prefix = [t.expand(patches.shape[0], -1, -1) for t in (cls_token, register_tokens) if t is not None]
    tokens = torch.cat([*prefix, patches], dim=1)
    if pos_embed is None:
        return tokens
    sizes = sizes_of(*inputs)
    before, of_patches = pos_embed.split((sizes.prefix_rows, sizes.patches), dim=1)
    without_row = pos_embed.new_zeros(1, num_prefix(sizes) - sizes.prefix_rows, pos_embed.shape[2])
    return tokens + torch.cat((before, without_row, of_patches), dim=1)
