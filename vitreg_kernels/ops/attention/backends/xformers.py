"""xformers' memory-efficient attention, by its public API only, imported when first used.

Serves plain, rotated and packed calls with autograd of its own; statistics come from ``statistics.py``.
"""

from __future__ import annotations

import torch

from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features, statistics
from ..packing import lengths
from ..rope import rotate_query_and_key
from ..types import AttentionInputs, AttentionResult

NAME = "xformers"
OPAQUE = False
REQUIREMENTS = Requirements(
    devices=("cuda",),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    head_dims=(8, 128),
    features=(features.ROPE, features.PACKING),
    min_capability=(8, 0),
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.head_dim % 8:
        reasons.append(f"takes head dims divisible by 8, not {request.head_dim}")
    if request.device in REQUIREMENTS.devices:
        reasons += _installation_faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    return ["has not been measured against torch's own attention here; name it to use it"]


def _installation_faults() -> list[str]:
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return [f"cannot be imported ({error}); install the extra vitreg_kernels[bench]"]
    return []


def forward(inputs: AttentionInputs) -> AttentionResult:
    from xformers.ops import fmha, memory_efficient_attention

    inputs = rotate_query_and_key(inputs)
    bias = None
    if inputs.cu_seqlens is not None:
        bias = fmha.BlockDiagonalMask.from_seqlens(lengths(inputs.cu_seqlens), device=inputs.query.device)
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    output = memory_efficient_attention(query, key, value, attn_bias=bias, scale=inputs.scale)
    output = output.contiguous().transpose(1, 2)
    return AttentionResult(output, statistics.of_output(inputs, output))
