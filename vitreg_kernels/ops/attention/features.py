"""What a call can ask of a backend beyond plain attention: the vocabulary of ``REQUIREMENTS`` and of error messages."""

from __future__ import annotations

import torch

from ..._runtime import tuning
from ..._runtime.dispatch import Request
from .types import AttentionInputs, mask_kind

KEY_PADDING_MASK = "key-padding masks"
BOOL_MASK = "boolean masks over query and key"
ADDITIVE_MASK = "additive masks"
MASK_GRADIENT = "gradients of the mask"
DROPOUT = "dropout"
ROPE = "rope"
PACKING = "cu_seqlens"
PACKING_COMPILED = "cu_seqlens under torch.compile"

ALL = (KEY_PADDING_MASK, BOOL_MASK, ADDITIVE_MASK, MASK_GRADIENT, DROPOUT, ROPE, PACKING, PACKING_COMPILED)

_OF_MASK = {"key_padding": KEY_PADDING_MASK, "bool": BOOL_MASK, "additive": ADDITIVE_MASK}


def request_of(inputs: AttentionInputs) -> Request:
    """What a validated call needs of a backend."""
    query, mask = inputs.query, inputs.attn_mask
    features = []
    if mask is not None:
        features.append(_OF_MASK[mask_kind(mask)])
        if mask.requires_grad and torch.is_grad_enabled():
            features.append(MASK_GRADIENT)
    if inputs.dropout_p > 0.0:
        features.append(DROPOUT)
    if inputs.rope is not None:
        features.append(ROPE)
    if inputs.cu_seqlens is not None:
        features.append(PACKING_COMPILED if torch.compiler.is_compiling() else PACKING)
    capability, bucket = (0, 0), "any"
    if query.is_cuda:
        capability = torch.cuda.get_device_capability(query.device)
        # Compiled for any length, the graph is bound to this bucket. Off a GPU no choice hangs on the length.
        bucket = tuning.length_bucket(query.shape[2] if inputs.cu_seqlens is None else inputs.max_seqlen)
    return Request(query.device.type, capability, query.dtype, query.shape[-1], tuple(features), bucket)
