"""What a mask says of whole keys, for backends in plain torch."""

from __future__ import annotations

import torch

from .types import AttentionInputs


def without_hidden_keys(inputs: AttentionInputs) -> AttentionInputs:
    """The call with key and value zero where the mask hides a key from every query of its image and head.

    Such a key is as good as absent, whatever it holds. Its probabilities are 0, but 0 times a NaN or an infinity would
    be NaN in all outputs and gradients.
    """
    mask = inputs.attn_mask
    if mask is None:
        return inputs
    seen = mask if mask.dtype == torch.bool else mask.detach() != -torch.inf
    hidden = ~seen.any(-2, keepdim=True).transpose(-2, -1)  # [B or 1, H or 1, N or 1, 1]
    return inputs._replace(key=inputs.key.masked_fill(hidden, 0.0), value=inputs.value.masked_fill(hidden, 0.0))
