"""What a call can ask of a backend beyond plain attention: the vocabulary of ``Requirements`` and of error messages."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Request, preferences
from .._shared import observers
from .._shared.capability import capability
from .types import AttentionInputs, mask_kind

KEY_PADDING_MASK = "key-padding masks"
BOOL_MASK = "boolean masks over query and key"
ADDITIVE_MASK = "additive masks"
MASK_GRADIENT = "gradients of the mask"
DROPOUT = "dropout"
ROPE = "rope"
PACKING = "cu_seqlens"
PACKING_COMPILED = "cu_seqlens under torch.compile"
DETERMINISTIC = "torch.use_deterministic_algorithms"
ONNX_STATISTICS = "statistics in ONNX export"

ALL = (
    KEY_PADDING_MASK,
    BOOL_MASK,
    ADDITIVE_MASK,
    MASK_GRADIENT,
    DROPOUT,
    ROPE,
    PACKING,
    PACKING_COMPILED,
    DETERMINISTIC,
    ONNX_STATISTICS,
)

# What this library's own kernels serve, and what torch code does, which reads ``cu_seqlens`` on the host; the
# statistics are torch code in the reference alone.
OF_OUR_KERNELS = (KEY_PADDING_MASK, ROPE, PACKING, PACKING_COMPILED, DETERMINISTIC)
OF_REFERENCE = tuple(feature for feature in ALL if feature != PACKING_COMPILED)
OF_SDPA = tuple(feature for feature in OF_REFERENCE if feature != ONNX_STATISTICS)

_OF_MASK = {"key_padding": KEY_PADDING_MASK, "bool": BOOL_MASK, "additive": ADDITIVE_MASK}


def request_of(inputs: AttentionInputs, qkv: Tensor | None = None) -> Request:
    """What a validated call needs of a backend.

    Args:
        inputs: the call.
        qkv: the packed projection whose gradient is written whole, where there is one; ``inputs`` holds no views of it
            then that know of gradients.
    """
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
    if torch.are_deterministic_algorithms_enabled():
        features.append(DETERMINISTIC)
    observing = observers.present()
    if observers.ONNX in observing and inputs.outputs:
        features.append(ONNX_STATISTICS)
    features += observing
    batch, heads, tokens, head_dim = query.shape
    images = batch
    if inputs.cu_seqlens is not None:
        images, tokens = inputs.cu_seqlens.shape[0] - 1, inputs.max_seqlen
    of_gpu = capability(query.device)
    request = Request("attention", query.device.type, of_gpu, query.dtype, head_dim, None, tuple(features))
    differentiable = (query, inputs.key, inputs.value) if qkv is None else (qkv,)
    workload = preferences.workload(request, query.device, tokens, images * heads, differentiable)
    if workload is None:
        return request
    variant = variant_of(
        packed_projection=qkv is not None,
        statistics=bool(inputs.outputs),
        tf32=query.dtype == torch.float32 and tf32_is_allowed(query.device.type),
    )
    return request._replace(workload=workload._replace(variant=variant))


def variant_of(*, packed_projection: bool, statistics: bool, tf32: bool = False) -> str:
    """What tells the times of calls apart beside their size: how query, key and value come, and what is asked for."""
    words = ["packed projection" if packed_projection else "separate"]
    return ", ".join(words + ["with statistics"] * statistics + ["tf32"] * tf32)


def tf32_is_allowed(device: str) -> bool:
    """Whether the user allows products of fp32 inputs to round them to tf32, which GPUs of a device type can."""
    return device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


# The compiler takes the answer for a constant, as in observers.py: it does not trace torch's settings.
tf32_is_allowed._dynamo_marked_constant = True
